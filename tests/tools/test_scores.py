"""Each score by hand, and against open_clip's own features."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from configs.errors import ConfigError, DataError
from configs.load import validate
from curation.scoring import RawSample
from curation.value_counts import bin_of, value_of_bin
from tests.small_model import write_small_model
from tools.score import ocr
from tools.score.base import scores
from tools.score.config import ScoreConfig
from tools.score.ocr import Region, area_share, paint_over
from tools.score.scorer import BatchScorer
from tools.score.scores.image_quality import gray_entropy, laplacian_variance
from tools.score.scores.masked_digits import mask_digits
from tools.score.scores.prompt_pair import read_pair
from tools.score.scores.text_overlap import overlap

PROMPTS = [["a bad thing", "something bad"], ["a good thing"]]


def png(seed: int, size=(24, 20)) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


# Of the picture itself


def test_blur_of_a_point_and_of_nothing():
    """A 3 x 3 picture of 0 with 1 in the middle. Mirrored at the border, each edge pixel has the
    point on two sides or one: the Laplacian is [[0, 2, 0], [2, -4, 2], [0, 2, 0]] (an edge pixel
    sees the point, and its mirror image behind the border). Mean 4 / 9, mean of squares 32 / 9.
    """
    point = np.zeros((3, 3))
    point[1, 1] = 1.0
    assert laplacian_variance(point) == pytest.approx(32 / 9 - (4 / 9) ** 2)
    assert laplacian_variance(np.full((5, 7), 9.0)) == 0
    assert laplacian_variance(np.full((1, 1), 9.0)) == 0


def test_blur_of_a_sharp_edge_is_above_that_of_a_soft_one():
    sharp = np.repeat([[0.0] * 8 + [255.0] * 8], 16, axis=0)
    soft = np.repeat([np.linspace(0, 255, 16)], 16, axis=0)
    assert laplacian_variance(sharp) > 10 * laplacian_variance(soft)


def test_entropy_counts_bits():
    assert gray_entropy(np.zeros((4, 4), np.uint8)) == 0
    assert gray_entropy(np.array([[0, 255], [255, 0]], np.uint8)) == 1
    assert gray_entropy(np.arange(256, dtype=np.uint8).reshape(16, 16)) == 8


@given(st.integers(0, 2**32 - 1))
def test_quality_does_not_depend_on_which_way_up_a_picture_stands(seed):
    gray = np.random.default_rng(seed).integers(0, 256, (6, 9), np.uint8)
    turned = gray[::-1, ::-1]
    assert gray_entropy(turned) == pytest.approx(gray_entropy(gray))
    expected = laplacian_variance(gray.astype(float))
    assert laplacian_variance(turned.astype(float)) == pytest.approx(expected)


# Of the caption


@pytest.mark.parametrize(
    ("caption", "replacement", "expected"),
    [
        ("Nike Air Max 90, 2019 edition", "", "Nike Air Max , edition"),
        ("1,000 cats", "#", "#,# cats"),
        ("B2B", "", "BB"),
        ("١٢٣ pages", "", "pages"),
        ("2024", "", ""),
        ("a \\1 g", "x", "a \\x g"),
        ("no digits  here", "", "no digits here"),
    ],
)
def test_digits_are_taken_out_of_a_caption(caption, replacement, expected):
    assert mask_digits(caption, replacement) == expected


@pytest.mark.parametrize(
    ("caption", "lines", "expected"),
    [
        ("Happy Birthday cake", ["HAPPY", "birthday!"], 2 / 3),
        ("happy happy joy", ["happy"], 2 / 3),  # each occurrence counts
        ("happy birthday", ["happybirthday"], 1.0),  # blanks were lost
        ("a cat", ["concatenate"], 0.0),  # too short to be looked for inside
        ("Birthday", ["Birthdav"], 1.0),  # 2 * 7 / 16 = 0.875
        ("Birthday", ["Birthduv"], 0.0),  # 2 * 6 / 16 = 0.75
        ("", ["text"], 0.0),
        ("a caption", [], 0.0),
        ("नमस्ते दुनिया", ["नमस्ते"], 0.5),
    ],
)
def test_the_share_of_a_caption_that_stands_in_its_picture(caption, lines, expected):
    assert overlap(caption, lines, 0.8) == pytest.approx(expected)


# Text in pictures


def box(left, top, right, bottom, text="x") -> Region:
    return Region(((left, top), (right, top), (right, bottom), (left, bottom)), text, 1.0)


def test_text_is_painted_over_with_the_mean_colour_around_it():
    """Left half 40, right half 200, a box across both: what is around it is half of each."""
    pixels = np.full((20, 40, 3), 40, np.uint8)
    pixels[:, 20:] = 200
    pixels[8:12, 16:24] = 255
    region = box(16, 8, 23, 11)
    painted = np.asarray(paint_over(Image.fromarray(pixels), [region]))
    assert np.unique(painted[8:12, 16:24]).tolist() == [120]
    outside = np.ones((20, 40), bool)
    outside[8:12, 16:24] = False
    assert np.array_equal(painted[outside], pixels[outside])
    assert area_share((40, 20), [region, region]) == 4 * 8 / (20 * 40)
    everything = paint_over(Image.new("RGB", (4, 4), "red"), [box(0, 0, 3, 3)])
    assert np.unique(np.asarray(everything)).tolist() == [128]


@pytest.mark.slow
def test_written_text_is_read_compared_and_painted_over():
    import matplotlib

    font = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    image = Image.new("RGB", (200, 160), (200, 220, 240))  # the reader scales 160 to 736
    draw = ImageDraw.Draw(image)
    draw.text((16, 32), "Happy\nBirthday", fill=(20, 20, 20), font=ImageFont.truetype(font, 36))
    reader = ocr.Ocr()
    regions = reader.regions(image)
    lines = [region.text for region in regions]
    assert overlap("happy birthday to you", lines, 0.8) == 0.5
    assert 0.1 < area_share(image.size, regions) < 0.6
    assert reader.regions(paint_over(image, regions)) == []
    assert reader.regions(Image.new("RGB", (8, 8))) == []


class FakeEngine:
    """Takes the place of RapidOCR, which needs minutes and gigabytes for what the test forbids."""

    def __init__(self, *boxes):
        self.boxes = [np.array(box, float) for box in boxes]

    def __call__(self, bgr_HW3, **options):
        self.shape = bgr_HW3.shape
        if not self.boxes:
            raise RuntimeError("a stage failed")
        found = type("Found", (), {"boxes": self.boxes})
        found.txts, found.scores = ["text"] * len(self.boxes), [1.0] * len(self.boxes)
        return found


def test_a_tall_picture_is_padded_for_the_reader_and_what_it_finds_there_is_cut(monkeypatch):
    inside, across = [[2, 2], [9, 2], [9, 8], [2, 8]], [[2, 2], [90, 2], [90, 8], [2, 8]]
    beyond = [[50, 2], [90, 2], [90, 8], [50, 8]]
    engine = FakeEngine(inside, across, beyond)
    monkeypatch.setattr(ocr.Ocr, "_engine", lambda self: engine)
    regions = ocr.Ocr().regions(Image.new("RGB", (16, 1600)))
    assert engine.shape == (1600, 200, 3)
    assert [max(x for x, _ in region.corners) for region in regions] == [9, 15]
    ocr.Ocr().regions(Image.new("RGB", (1600, 16)))
    assert engine.shape == (16, 1600, 3)


def test_pictures_that_would_take_gigabytes_or_break_the_reader_are_bad_and_not_fatal(
    monkeypatch, encoder
):
    monkeypatch.setattr(ocr.Ocr, "_engine", lambda self: FakeEngine())
    samples = [SAMPLES[0], RawSample("long", png(1, (1, 20_000))), SAMPLES[1]]
    found = score(encoder, [{"name": "clip_score"}], samples)
    assert found.bad == {1: "1 x 20,000 pixels: more than 100 times as long as wide"}
    assert np.isfinite(found.columns["clip_score"][[0, 2]]).all()
    sections = [{"name": n} for n in ("clip_score", "text_overlap", "clip_score_text_masked")]
    found = score(encoder, sections, SAMPLES[:2])
    assert found.bad == dict.fromkeys((0, 1), "its text cannot be read (a stage failed)")
    alone = score(encoder, sections[:1], SAMPLES[:2])
    assert np.array_equal(found.columns["clip_score"], alone.columns["clip_score"])
    for name in ("text_overlap", "text_area", "clip_score_text_masked"):
        assert np.isnan(found.columns[name]).all()


# Of the model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoder(model_folder):
    from evaluation.encoder import load_encoder

    return load_encoder(str(model_folder))


CAPTIONS = [f"picture {i} of a thing number {i * i}" for i in range(11)]
SAMPLES = [RawSample(caption, png(i)) for i, caption in enumerate(CAPTIONS)]


def build(*sections):
    return [scores.section(s["name"]).model_validate(s).build() for s in sections]


def score(encoder, sections, samples=SAMPLES, *, batch_size=4, names=None):
    built = build(*sections)
    scorer = BatchScorer(built, encoder, batch_size=batch_size, num_threads=2)
    names = names or frozenset().union(*(one.names for one in built))
    return scorer.score(iter(samples), len(samples), names)


ALL = (
    {"name": "clip_score"},
    {"name": "clip_score_masked_digits"},
    {"name": "prompt_pair", "column": "bad", "prompts": PROMPTS, "logit_scale": 10},
    {"name": "embeddings"},
    {"name": "image_quality"},
)


def test_clip_scores_are_those_of_open_clips_own_features(encoder, model_folder):
    import torch

    from pretrain.model.clip import open_clip

    name = f"local-dir:{model_folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenize = open_clip.get_tokenizer(name)
    model.eval()
    pixels = torch.stack([preprocess(Image.open(io.BytesIO(s.image))) for s in SAMPLES])
    with torch.no_grad():
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(tokenize(CAPTIONS), normalize=True)
        masked = [mask_digits(caption) for caption in CAPTIONS]
        masked_text = model.encode_text(tokenize(masked), normalize=True)
        sides = [model.encode_text(tokenize(side), normalize=True).mean(0) for side in PROMPTS]
    found = score(encoder, ALL)
    np.testing.assert_allclose(found.columns["clip_score"], (image * text).sum(1), atol=1e-5)
    expected = (image * masked_text).sum(1)
    np.testing.assert_allclose(found.columns["clip_score_masked_digits"], expected, atol=1e-5)
    prompts = torch.nn.functional.normalize(torch.stack(sides), dim=1)
    expected = (10 * image @ prompts.T).softmax(1)[:, 0]
    np.testing.assert_allclose(found.columns["bad"], expected, atol=1e-5)
    for name, features in (("clip_image", image), ("clip_text", text)):
        assert found.vectors[name].dtype == np.float16
        np.testing.assert_allclose(found.vectors[name], features, atol=1e-3)


@pytest.mark.parametrize("geometry", ["euclidean", "elliptic", "lorentz"])
def test_another_geometry_scores_by_its_own_similarity(encoder, geometry):
    from pretrain.model.similarity import similarity_of

    similarity = similarity_of({"pairmill": {"similarity": {"name": geometry}}})
    other = dataclasses.replace(encoder, similarity=similarity)
    found = score(other, [{"name": "clip_score"}, {"name": "embeddings"}])
    image, text = (found.vectors[n].astype(float) for n in ("clip_image", "clip_text"))
    if geometry == "euclidean":
        expected = -((image - text) ** 2).sum(1)
    elif geometry == "elliptic":
        expected = -np.arccos((image * text).sum(1))
    else:  # curvature -1: arccosh of minus the Lorentz product
        times = [np.sqrt(1 + (x**2).sum(1)) for x in (image, text)]
        expected = -np.arccosh(times[0] * times[1] - (image * text).sum(1))
    np.testing.assert_allclose(found.columns["clip_score"], expected, rtol=5e-3, atol=5e-3)


def test_neither_order_nor_batches_nor_neighbours_change_a_score(encoder):
    whole = score(encoder, ALL, batch_size=64)
    order = np.random.default_rng(1).permutation(len(SAMPLES))
    mixed = [SAMPLES[i] for i in order]
    mixed.insert(3, RawSample("broken", SAMPLES[0].image[:50]))
    rows = [i for i in range(len(mixed)) if i != 3]
    again = score(encoder, ALL, mixed, batch_size=2)
    for name, values in whole.columns.items():
        np.testing.assert_allclose(again.columns[name][rows], values[order], atol=1e-5, rtol=1e-5)
        assert np.isnan(again.columns[name][3])
    for name, vectors in whole.vectors.items():
        np.testing.assert_allclose(again.vectors[name][rows], vectors[order], atol=1e-3)
        assert np.isnan(again.vectors[name][3]).all()
    assert list(again.bad) == [3]
    one = score(encoder, ALL, names=frozenset({"blur"}))
    assert set(one.columns) == {"blur", "entropy"}
    assert np.array_equal(one.columns["blur"], whole.columns["blur"])


def test_a_shard_without_a_usable_image_has_no_score_and_no_vector(encoder):
    found = score(encoder, ALL, [RawSample("a", b""), RawSample("b", b"no image")])
    assert sorted(found.bad) == [0, 1]
    assert all(np.isnan(values).all() for values in found.columns.values())
    assert found.vectors["clip_image"].shape == (2, 16)
    assert np.isnan(found.vectors["clip_image"]).all()


def test_what_a_reader_raises_reaches_the_caller(encoder):
    def samples():
        yield SAMPLES[0]
        raise DataError("the storage failed")

    scorer = BatchScorer(build({"name": "clip_score"}), encoder, batch_size=1, num_threads=1)
    with pytest.raises(DataError, match="the storage failed"):
        scorer.score(samples(), 2, frozenset({"clip_score"}))


def test_without_text_the_masked_score_is_the_clip_score_and_with_text_it_is_not(encoder):
    class Reads(ocr.Ocr):
        """Says that pictures that are taller than wide hold text in their upper half."""

        def regions(self, image):
            width, height = image.size
            return [box(0, 0, width - 1, height // 2)] if height > width else []

    samples = [RawSample(f"thing {i}", png(i, (20, 20 + 8 * (i % 2)))) for i in range(6)]
    names = [{"name": "clip_score"}, {"name": "clip_score_text_masked"}]
    scorer = BatchScorer(build(*names), encoder, batch_size=4, num_threads=2)
    scorer._ocr = Reads()
    found = scorer.score(samples, 6, frozenset({"clip_score", "clip_score_text_masked"})).columns
    plain, masked = found["clip_score"], found["clip_score_text_masked"]
    assert np.array_equal(masked[::2], plain[::2])
    assert (np.abs(masked[1::2] - plain[1::2]) > 1e-4).all()
    images = [Image.open(io.BytesIO(s.image)).convert("RGB") for s in samples]
    painted = []
    for image, sample in zip(images, samples, strict=True):
        regions = scorer._ocr.regions(image)
        file = io.BytesIO()
        (paint_over(image, regions) if regions else image).save(file, "PNG")
        painted.append(RawSample(sample.caption, file.getvalue()))
    expected = score(encoder, [{"name": "clip_score"}], painted).columns["clip_score"]
    np.testing.assert_allclose(masked, expected, atol=1e-5)


def test_tuned_vectors_come_from_arrays_and_never_from_pickles(tmp_path, encoder):
    from safetensors.numpy import save_file

    pair = encoder.encode_texts(["a bad thing", "a good thing"]).numpy()
    np.save(tmp_path / "pair.npy", pair)
    save_file({"prompts": pair}, tmp_path / "pair.safetensors")
    prompts = {"name": "prompt_pair", "column": "c", "prompts": [["a bad thing"], ["a good thing"]]}
    expected = score(encoder, [prompts]).columns["c"]
    for name in ("pair.npy", "pair.safetensors"):
        section = {"name": "prompt_pair", "column": "c", "vectors": str(tmp_path / name)}
        np.testing.assert_allclose(score(encoder, [section]).columns["c"], expected, atol=1e-6)

    class Evil:
        def __reduce__(self):
            return os.system, ("touch pickled",)

    (tmp_path / "pair.p").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConfigError, match="A pickle"):
        read_pair(tmp_path / "pair.p")
    (tmp_path / "evil.npy").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(DataError, match="cannot be read as vectors"):
        read_pair(tmp_path / "evil.npy")
    np.save(tmp_path / "object.npy", np.array([Evil(), Evil()]), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read as vectors"):
        read_pair(tmp_path / "object.npy")
    np.save(tmp_path / "three.npy", np.zeros((3, 4)))
    with pytest.raises(DataError, match=r"expected one of \[2, D\]"):
        read_pair(tmp_path / "three.npy")
    np.save(tmp_path / "zero.npy", np.eye(3)[:2] * [1, 0, 0])
    with pytest.raises(DataError, match="a vector is zero or not finite"):
        read_pair(tmp_path / "zero.npy")
    np.save(tmp_path / "narrow.npy", np.ones((2, 4)))
    narrow = {"name": "prompt_pair", "column": "c", "vectors": str(tmp_path / "narrow.npy")}
    with pytest.raises(DataError, match="got vectors of width 4; this model's have 16"):
        score(encoder, [narrow])
    assert not Path("pickled").exists()


# The configuration


def config(*sections, **changes):
    tree = {"name": "t", "manifest": "m", "model": {"checkpoint": "c"}, "scores": list(sections)}
    return validate({**tree, **changes}, ScoreConfig, label="t")


@pytest.mark.parametrize(
    ("sections", "changes", "message"),
    [
        ([{"name": "clip_scor"}], {}, "did you mean 'clip_score'"),
        ([{"name": "clip_score"}], {"model": None}, "clip_score need a model"),
        ([{"name": "clip_score"}], {"manifest": None}, "either `manifest`"),
        ([{"name": "clip_score"}, {"name": "clip_score"}], {}, "two scores make 'clip_score'"),
        ([{"name": "clip_score", "column": "width"}], {}, "'width' is a column that every index"),
        ([{"name": "clip_score", "column": "a.b"}], {}, "column"),
        ([{"name": "prompt_pair", "column": "c"}], {}, "either `prompts`"),
        ([{"name": "embeddings", "image": None, "text": None}], {}, "both `image` and `text`"),
        ([{"name": "image_quality", "blur": None, "entropy": None}], {}, "both `blur`"),
        ([{"name": "image_quality", "blur": "A B"}], {}, r"t: 1 problem\n.*blur"),
        (
            [{"name": "prompt_pair", "column": "c", "prompts": ["a", "b"]}],
            {},
            r"t: 2 problems\n.*prompts\.0: Input should be a valid list \(got 'a'\)",
        ),
        ([{"name": "prompt_pair", "column": "c", "vectors": "no.npy"}], {}, "no file 'no.npy'"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(sections, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(*sections, **changes)


def test_scores_that_need_no_model_need_no_model_section():
    assert config({"name": "image_quality"}, model=None).model is None


def test_without_the_ocr_library_a_score_is_skipped_and_says_how_to_get_it(monkeypatch):
    from tools.score.job import ScorePlan

    monkeypatch.setattr(ocr, "PACKAGES", ("no_such_package",))
    sections = [{"name": "text_overlap"}, {"name": "image_quality"}]
    plan = ScorePlan(config(*sections, model=None))
    why = "no_such_package is not installed: pip install 'pairmill[ocr]'"
    assert plan.skipped == {"text_area, text_overlap": why}
    assert [output.name for output in plan.outputs] == ["blur", "entropy"]


def test_a_score_is_known_by_all_that_its_values_depend_on(model_folder):
    from tools.score.job import ScorePlan

    def makers(*sections, **changes):
        model = {"checkpoint": str(model_folder), **changes}
        return [output.made_by for output in ScorePlan(config(*sections, model=model)).outputs]

    plain = makers({"name": "clip_score"})
    assert plain == makers({"name": "clip_score", "column": "other"})
    different = [
        makers({"name": "clip_score"}, precision="bf16"),
        makers({"name": "clip_score_masked_digits"}),
        makers({"name": "clip_score_masked_digits", "replacement": "#"}),
        makers({"name": "embeddings"}),
        makers({"name": "image_quality"}),
        makers({"name": "image_quality", "max_side": 256}),
    ]
    flat = [*plain, *(maker for found in different for maker in found)]
    assert len(set(flat)) == len(flat)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_bins_keep_the_order_of_scores_and_are_narrow(values):
    array = np.sort(np.array(values, np.float32))
    bins = bin_of(array)
    assert (np.diff(bins) >= 0).all()
    edges = np.array([value_of_bin(number) for number in bins.tolist()])
    assert (edges <= array).all()
    normal = np.abs(array) > 1e-30
    assert (np.abs(edges - array)[normal] <= 0.0079 * np.abs(array)[normal]).all()
