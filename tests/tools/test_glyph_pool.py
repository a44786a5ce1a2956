"""The glyph pool: what it holds, what it holds out, and that it is the same every time."""

import hashlib
import io
import json
import os
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="the glyph pool draws matplotlib's fonts")

from configs.errors import UsageError
from tools.glyph_pool import make_pool
from tools.glyph_pool.__main__ import main
from tools.glyph_pool.captions import character_name, describe, name_words
from tools.glyph_pool.fonts import FACES, SERIF_FACES, TRAINING_FACES, Look, draw_picture, scan
from tools.glyph_pool.pool import training_jobs
from tools.glyph_pool.split import MIN_TRAINING_FACES, link_equal_drawings, split_glyphs
from tools.glyph_pool.tars import write_tar

LIMIT = 1200


@pytest.fixture(scope="module")
def drawings():
    return {face.stem: scan(face) for face in FACES}


@pytest.fixture(scope="module")
def full_split(drawings):
    return split_glyphs(drawings)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    out = tmp_path_factory.mktemp("pool") / "pool"
    make_pool(out, limit=LIMIT, num_workers=1)
    return out


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def samples_of(tar_path: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = defaultdict(dict)
    with tarfile.open(tar_path) as tar:
        for member in tar:
            key, extension = member.name.split(".")
            samples[key][extension] = tar.extractfile(member).read()
    return dict(samples)


def training_samples(pool: Path) -> list[dict]:
    return [s for tar in sorted(pool.glob("train/*.tar")) for s in samples_of(tar).values()]


def test_the_bytes_do_not_depend_on_the_number_of_workers(pool, tmp_path):
    make_pool(tmp_path / "again", limit=LIMIT, num_workers=2)
    assert digests(tmp_path / "again") == digests(pool)


def test_every_training_pair_has_the_keys_and_fields_of_img2dataset(pool):
    for tar in sorted(pool.glob("train/*.tar")):
        for number, (key, sample) in enumerate(samples_of(tar).items()):
            assert key == f"{tar.stem}{number:04d}"
            assert sorted(sample) == ["json", "png", "txt"]
            fields = json.loads(sample["json"])
            assert fields["key"] == key
            assert fields["status"] == "success"
            assert fields["caption"] == sample["txt"].decode()
            picture = Image.open(io.BytesIO(sample["png"]))
            assert picture.size == (fields["width"], fields["height"])
            assert fields["sha256"] == hashlib.sha256(sample["png"]).hexdigest()


def test_every_caption_says_the_name_or_the_code_of_its_character(pool):
    samples = training_samples(pool)
    assert len(samples) == LIMIT
    num_codes = 0
    for sample in samples:
        fields, caption = json.loads(sample["json"]), sample["txt"].decode()
        assert fields["character_name"] == character_name(fields["codepoint"])
        is_code = caption == f"U+{fields['codepoint']:04X}"
        assert is_code or fields["character_name"] in caption
        num_codes += is_code
    assert 0.005 * LIMIT < num_codes < 0.04 * LIMIT


def test_pictures_are_dark_on_light_with_a_few_thumbnails(pool):
    sides = []
    for sample in training_samples(pool):
        picture = Image.open(io.BytesIO(sample["png"]))
        assert picture.mode == "L"
        low, high = picture.getextrema()
        assert high >= 215
        assert low < high - 40
        sides.append(picture.width)
    assert all(12 <= side <= 19 or 32 <= side <= 64 for side in sides)
    assert 0.01 < sum(side < 20 for side in sides) / len(sides) < 0.06


def test_no_serif_picture_is_in_training(pool):
    assert all(json.loads(s["json"])["font"] != "DejaVu Serif" for s in training_samples(pool))


def test_a_limited_pool_still_has_its_letters_and_digits(pool):
    counts = json.loads((pool / "pool.json").read_text())
    assert counts["num_training_pairs"] == LIMIT
    assert counts["evaluation"]["serif-letters-digits"]["num_classes"] >= 50
    assert counts["evaluation"]["unseen"]["num_pictures"] >= 5


def test_no_held_out_drawing_is_trained_on_under_any_name(full_split, drawings):
    trained = {drawings[stem][codepoint] for stem, codepoint in full_split.training}
    trained_codepoints = {codepoint for _, codepoint in full_split.training}
    held_out = {codepoint for character in full_split.unseen for codepoint in character.codepoints}
    assert not held_out & trained_codepoints
    for codepoint in held_out:
        for face in TRAINING_FACES:
            assert drawings[face.stem].get(codepoint) not in trained


def test_the_full_pool_has_the_size_that_the_readme_says(full_split):
    assert len(full_split.training) > 33_000
    held_out = len(full_split.unseen)
    groups = held_out + len({codepoint for _, codepoint in full_split.training})
    assert 0.07 < held_out / groups < 0.13
    assert 50 <= len(full_split.letters_and_digits()) <= 62
    assert len(set(full_split.class_names())) == len(full_split.class_codepoints)


def test_every_class_character_is_seen_in_five_training_fonts(full_split):
    faces = defaultdict(set)
    for stem, codepoint in full_split.training:
        faces[codepoint].add(stem)
    for members in full_split.class_codepoints:
        assert all(len(faces[codepoint]) >= MIN_TRAINING_FACES for codepoint in members)


def test_merged_classes_are_drawn_alike_and_different_classes_never(full_split, drawings):
    regular = drawings[SERIF_FACES[0].stem]
    for members in full_split.class_codepoints:
        assert len({regular[codepoint] for codepoint in members}) == 1
    labels = defaultdict(set)
    for (stem, codepoint), label in full_split.serif:
        labels[drawings[stem][codepoint], stem].add(label)
    assert all(len(found) == 1 for found in labels.values())


def test_no_serif_drawing_is_trained_on_and_none_comes_twice(full_split, drawings):
    trained = {drawings[stem][codepoint] for stem, codepoint in full_split.training}
    shown = [drawings[stem][codepoint] for (stem, codepoint), _ in full_split.serif]
    assert not trained & set(shown)
    assert len(shown) == len(set(shown))
    labels = {label for _, label in full_split.serif}
    assert labels == set(range(len(full_split.class_codepoints)))


def test_latin_greek_and_cyrillic_capital_o_are_one_class_named_after_latin(full_split):
    merged = [members for members in full_split.class_codepoints if members[0] == ord("O")]
    assert len(merged) == 1
    assert {0x039F, 0x041E} <= set(merged[0])
    assert "latin capital letter o" in full_split.class_names()


def test_equal_drawings_link_across_faces():
    # a = b in the first face, b = c in the second; d stands alone.
    faces = [{1: b"x", 2: b"x", 4: b"d"}, {2: b"y", 3: b"y"}]
    assert link_equal_drawings(faces) == [(1, 2, 3), (4,)]


def test_every_caption_of_an_unseen_picture_names_the_same_drawing(full_split, drawings):
    for character in full_split.unseen:
        stem, codepoint = character.glyph
        assert codepoint == character.codepoints[0]
        assert len({drawings[stem][other] for other in character.codepoints}) == 1


def test_evaluation_datasets_have_the_layout_of_clip_benchmark(pool):
    for name in ("serif", "serif-letters-digits"):
        folder = pool / "eval" / name
        class_names = (folder / "classnames.txt").read_text().splitlines()
        templates = (folder / "zeroshot_classification_templates.txt").read_text().splitlines()
        assert all("{c}" in template for template in templates)
        num_tars = int((folder / "test/nshards.txt").read_text())
        samples = [
            s for n in range(num_tars) for s in samples_of(folder / f"test/{n}.tar").values()
        ]
        assert {int(s["cls"]) for s in samples} == set(range(len(class_names)))
        assert all(Image.open(io.BytesIO(s["png"])).width >= 32 for s in samples)
    unseen = pool / "eval/unseen"
    assert (unseen / "dataset_type.txt").read_text().strip() == "retrieval"
    assert all(s["txt"].decode().strip() for s in samples_of(unseen / "test/0.tar").values())


def test_webdataset_reads_every_training_pair(pool):
    webdataset = pytest.importorskip("webdataset")
    tars = [str(path) for path in sorted(pool.glob("train/*.tar"))]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len(samples) == LIMIT
    assert {"png", "txt", "json"} <= set(samples[0])


def test_metadata_lists_words_of_names_letters_and_digits_once(pool):
    words = (pool / "metadata.txt").read_text(encoding="utf-8").splitlines()
    assert words == sorted(set(words)) == name_words()
    assert {"a", "z", "letter", "queen", "hyphen-minus", "ideograph"} <= set(words)
    assert "ideograph-4e01" not in words


def test_shuffled_captions_are_a_permutation_that_hardly_any_pair_survives(
    pool, drawings, tmp_path
):
    for job in training_jobs(tmp_path, split_glyphs(drawings, LIMIT), shuffle_captions=True):
        write_tar(job)
    plain, control = training_samples(pool), training_samples(tmp_path)
    assert sorted(s["txt"] for s in control) == sorted(s["txt"] for s in plain)
    assert [s["png"] for s in control] == [s["png"] for s in plain]
    right = sum(json.loads(s["json"])["character_name"] in s["txt"].decode() for s in control)
    assert right < 0.02 * LIMIT


def test_an_existing_pool_is_left_alone(pool, capsys):
    before = {path: os.stat(path).st_mtime_ns for path in pool.rglob("*")}
    assert make_pool(pool, limit=LIMIT) == json.loads((pool / "pool.json").read_text())
    assert "nothing to do" in capsys.readouterr().err
    assert {path: os.stat(path).st_mtime_ns for path in pool.rglob("*")} == before


def test_a_folder_with_something_else_in_it_is_refused_and_untouched(pool, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a glyph pool"):
        make_pool(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UsageError, match="another glyph pool"):
        make_pool(pool, limit=LIMIT + 1)


def test_a_pool_of_other_software_versions_is_not_taken_for_this_one(pool, tmp_path):
    content = json.loads((pool / "pool.json").read_text())
    content["software"]["pillow"] = "1.1.7"
    (tmp_path / "pool.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"1\.1\.7.*Remove it"):
        make_pool(tmp_path, limit=LIMIT)


def test_a_folder_that_cannot_be_made_is_a_message_and_exit_code_1(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert main([str(tmp_path / "file/pool"), "--limit", "100", "--workers", "1"]) == 1
    message = capsys.readouterr().err
    assert "could not be written" in message
    assert "Traceback" not in message


def test_wrong_usage_is_a_message_and_exit_code_2(tmp_path, capsys):
    assert main([str(tmp_path / "pool"), "--limit", "0"]) == 2
    assert "expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("side", [12, 33, 64])
@pytest.mark.parametrize("shift", [-0.07, 0.07])
def test_no_ink_touches_the_edge_of_the_picture(side, shift):
    look = Look(side_pixels=side, em=0.9, shift_x=shift, shift_y=shift, paper=255, ink=0)
    for codepoint in map(ord, "AgÅj_M⟿"):
        pixels = Image.open(io.BytesIO(draw_picture(FACES[0], codepoint, look))).convert("L")
        border = pixels.copy()
        border.paste(255, (1, 1, side - 1, side - 1))
        assert border.getextrema() == (255, 255)
        assert pixels.getextrema()[0] < 200


def test_phrasings_name_the_character_and_at_most_its_style():
    said = {describe(0x2655, "bold", draw / 100) for draw in range(100)}
    assert "a white chess queen in bold" in said
    assert "white chess queen" in said
    assert len(said) == 7
    assert describe(0x2191, "plain", 0.2).startswith("an upwards")
