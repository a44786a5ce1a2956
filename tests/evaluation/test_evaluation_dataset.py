"""Evaluation folders: what is read, in which order, and what is said about a bad one."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import COLORS, png, write_classification, write_retrieval, write_tar

from configs.errors import DataError
from evaluation.config import DatasetConfig
from evaluation.dataset import EvaluationDataset
from evaluation.datasets import load_dataset
from evaluation.images import UndecodableImageError, read_image
from evaluation.tar import Span, scan_tar

Broken = Callable[..., Path]


def load(folder: Path, **keys: object) -> EvaluationDataset:
    return load_dataset(DatasetConfig(path=str(folder), **keys))


def test_samples_stand_in_tar_order_with_their_labels(classification: Path) -> None:
    dataset = load(classification)
    keys = [sample.key for sample in dataset.test.samples]
    numbers = [*range(0, 18, 2), *range(1, 18, 2)]  # even ones in 0.tar, odd ones in 1.tar
    assert keys == [f"{number:06d}" for number in numbers]
    assert dataset.test.labels().tolist() == [number % 6 for number in numbers]
    assert dataset.test.samples[3].image.read() == png(6, 0)
    assert (dataset.name, dataset.class_names) == ("colours", COLORS)
    assert dataset.prompts.of(0) == ["a red picture", "the colour red"]


def test_captions_know_their_image(retrieval_data: Path) -> None:
    dataset = load(retrieval_data)
    assert dataset.test.captions[:4] == (
        "picture 0 in red",
        "picture 1 in green",
        "number 1",
        "picture 2 in blue",
    )
    assert dataset.test.image_of_caption_m[:7].tolist() == [0, 1, 1, 2, 2, 2, 3]


def test_class_names_may_repeat_and_are_never_format_strings(tmp_path: Path) -> None:
    folder = write_classification(tmp_path / "data")
    names = ["missile", "missile", "{0.__class__}", "{c}", "a\u2028b", "x"]
    (folder / "classnames.txt").write_text("\n".join(names))
    dataset = load(folder)
    assert dataset.class_names == tuple(names)
    assert dataset.prompts.of(2)[0] == "a {0.__class__} picture"


def test_the_digest_is_of_the_pictures_and_the_prompt_digest_of_the_words(tmp_path: Path) -> None:
    one = load(write_classification(tmp_path / "one"))
    same = load(write_classification(tmp_path / "two"))
    assert one.test.data_digest == same.test.data_digest
    (tmp_path / "two" / "classnames.txt").write_text("\n".join(reversed(COLORS)))
    words = load(tmp_path / "two")
    assert words.test.data_digest == one.test.data_digest
    assert words.prompt_digest != one.prompt_digest
    more = load(write_classification(tmp_path / "three", num_images=19))
    assert more.test.data_digest != one.test.data_digest


def test_leaving_samples_out_takes_their_labels_and_captions_along(
    classification: Path, retrieval_data: Path
) -> None:
    labelled = load(classification).test.without([0, 17])
    assert len(labelled.samples) == len(labelled.labels()) == 16
    assert labelled.labels()[0] == 2
    captioned = load(retrieval_data).test.without([1])
    assert captioned.captions[1] == "picture 2 in blue"
    assert captioned.image_of_caption_m[:5].tolist() == [0, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"nshards": None}, "nshards.txt is missing"),
        ({"nshards": "many"}, "expected the number of tars, 1 to 100,000, got 'many'"),
        ({"nshards": "9" * 5000}, "expected the number of tars, 1 to 100,000"),
        ({"nshards": "999999999"}, "1 to 100,000, got '999999999'"),
        ({"nshards": "3"}, "promises 3 tars, but .*2.tar is missing"),
        ({"classnames": None}, "classnames.txt is missing; expected one class name a line"),
        ({"classnames": "red\n\nblue\n"}, "classnames.txt: line 2 is empty"),
        ({"classnames": "red\ngreen\n"}, "the label '[2-5]'; expected a number from 0 to 1"),
        ({"classnames": b"\xff\xfe"}, "classnames.txt is not UTF-8"),
        ({"zeroshot_classification_templates": None}, "one prompt a line, for example"),
        ({"zeroshot_classification_templates": "a photo"}, "expected {c} in it"),
        ({"dataset_type": "poems"}, "expected retrieval or classification, got 'poems'"),
        ({"dataset_type": "retrieval"}, "sample 000000 has no caption"),
        ({"tar": b"this is not a tar" * 100}, "1.tar is not a readable tar"),
    ],
)
def test_a_bad_folder_is_refused_with_what_was_expected(
    broken_copy: Broken, files: dict[str, str | bytes | None], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(broken_copy(**files))


def test_a_missing_folder_and_an_empty_dataset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no dataset folder"):
        load(tmp_path / "nothing")
    folder = write_classification(tmp_path / "empty", num_images=0)
    with pytest.raises(DataError, match="is empty"):
        load(folder)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.cls", b"0")], "sample a has 0 images"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"0")], "sample a has 2 images"),
        ([("a.png", b"x")], "sample a has no .cls"),
        ([("a.png", b"x"), ("a.cls", b"cat")], "the label 'cat'"),
        ([("a.png", b"x"), ("a.cls", b"-1")], "the label '-1'"),
        ([("a.png", b"x"), ("a.cls", b"1" * 5000)], "the label '1111"),
        ([("a.png", b"x"), ("a.cls", b"\xff")], "a.cls is not UTF-8"),
        ([("a.png", b"x"), ("a.png", b"y"), ("a.cls", b"0")], "a.png comes twice"),
    ],
)
def test_a_bad_sample_is_named(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    folder = write_classification(tmp_path / "data", num_tars=1)
    write_tar(folder / "test" / "0.tar", members)
    with pytest.raises(DataError, match=message):
        load(folder)


def test_a_retrieval_dataset_taken_for_classification_says_what_to_do(tmp_path: Path) -> None:
    folder = write_retrieval(tmp_path / "data")
    for name in ("classnames.txt", "zeroshot_classification_templates.txt"):
        (folder / name).write_text("{c}\n")
    with pytest.raises(DataError, match="task: retrieval"):
        load(folder, task="zero_shot")


def test_a_tar_that_breaks_in_the_middle_is_not_taken_for_a_shorter_one(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    write_tar(path, [(f"{i}.cls", b"0") for i in range(4)])
    data = bytearray(path.read_bytes())
    data[2 * 1024 + 148] ^= 0xFF  # the third header's checksum
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged at byte 2,048"):
        scan_tar(path)
    path.write_bytes(bytes(data[:1900]))
    with pytest.raises(DataError, match=r"0\.tar"):
        scan_tar(path)


def test_a_tar_cut_between_two_members_is_not_taken_for_a_shorter_one(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    write_tar(path, [(f"{i}.cls", b"0") for i in range(4)])
    data = path.read_bytes()
    path.write_bytes(data[: 3 * 1024])  # three headers with a block each, and no end
    with pytest.raises(DataError, match=r"0\.tar is cut off at byte 3,072"):
        scan_tar(path)
    path.write_bytes(data[: 4 * 1024 + 512])  # one block of zeros is enough
    assert len(scan_tar(path)) == 4


def test_a_name_that_is_not_utf8_becomes_a_key_that_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    write_tar(path, [("caf_.cls", b"0")])
    data = bytearray(path.read_bytes())
    data[3] = 0xE9
    data[148:156] = b"%06o\0 " % (sum(data[:148]) + 8 * 32 + sum(data[156:512]))
    path.write_bytes(data)
    (sample,) = scan_tar(path)
    assert sample.key == "caf\\xe9"
    sample.key.encode()


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"GNU.sparse.map": "0,many"}, "is not a readable tar"),
        ({"GNU.sparse.map": "0,1", "GNU.sparse.size": "1"}, "a.cls is stored sparse"),
    ],
)
def test_sparse_members_are_refused(tmp_path: Path, headers: dict[str, str], message: str) -> None:
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("a.cls")
        member.size, member.pax_headers = 1, headers
        tar.addfile(member, io.BytesIO(b"0"))
    with pytest.raises(DataError, match=message):
        scan_tar(path)


def test_links_and_paths_out_of_the_tar_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    write_tar(
        path, [("../a.txt", b"x"), ("/b.txt", b"x"), ("d/c.TXT", b"x"), ("no-extension", b"")]
    )
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("e.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "c.txt"
        tar.addfile(link)
    samples = scan_tar(path)
    assert [(sample.key, list(sample.members)) for sample in samples] == [("d/c", ["txt"])]


def _chunk(name: bytes, data: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + crc


def _bomb(side_pixels: int) -> bytes:
    """A PNG of a few bytes whose header promises a huge picture."""
    header = struct.pack(">IIBBBBB", side_pixels, side_pixels, 8, 0, 0, 0, 0)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(b"0")) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cannot identify"),
        (b"not an image", "cannot identify"),
        (png(0, 0)[:200], "."),
        (_bomb(10_000), "decompression bomb"),
        (_bomb(40_000), "decompression bomb"),
    ],
    ids=["empty", "text", "truncated", "bomb", "huge bomb"],
)
def test_what_is_no_image_is_refused_with_a_reason(
    tmp_path: Path, data: bytes, reason: str
) -> None:
    path = tmp_path / "data"
    path.write_bytes(data)
    with pytest.raises(UndecodableImageError, match=reason):
        read_image(Span(path, 0, len(data)))


def test_pictures_of_any_mode_become_rgb(tmp_path: Path) -> None:
    from PIL import Image

    for mode in ("L", "P", "RGBA", "1", "LA", "I;16"):
        buffer = io.BytesIO()
        Image.fromarray(np.full((5, 4), 90, np.uint8)).convert(
            "I" if mode == "I;16" else mode
        ).convert(mode).save(buffer, format="PNG")
        path = tmp_path / "image"
        path.write_bytes(buffer.getvalue())
        image = read_image(Span(path, 0, len(buffer.getvalue())))
        assert (image.mode, image.size) == ("RGB", (4, 5))


@pytest.mark.parametrize("image_format", ["GIF", "BMP", "TIFF", "WEBP", "JPEG"])
def test_every_format_that_curation_keeps_is_read(tmp_path: Path, image_format: str) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (4, 5), 90).save(buffer, format=image_format)
    path = tmp_path / "image"
    path.write_bytes(buffer.getvalue())
    assert read_image(Span(path, 0, len(buffer.getvalue()))).size == (4, 5)


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"123")
    with pytest.raises(DataError, match="became shorter"):
        Span(path, 1, 9).read()
