"""The pixel nearest-neighbour baseline: neighbours, word overlap, and the shared metric code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import png, write_tar
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from configs.errors import DataError
from evaluation.config import DatasetConfig
from evaluation.datasets import load_dataset
from evaluation.methods.zero_shot import accuracies
from evaluation.pixel_baseline import CaptionScores, find_neighbours, pixel_vector, words

TEXT = st.text(alphabet="ab ", max_size=6)


def test_the_overlap_is_shared_words_of_all_words_by_hand() -> None:
    # {a, red, square} and {red}: 1 of 3; and {a, red, circle}: 2 of 4; and {"Blue"}: 0.
    scores = CaptionScores(["A red square."], ["red", "a RED circle", "blue", "..."])
    assert scores.image_rows(0, 1)[0].tolist() == pytest.approx([1 / 3, 1 / 2, 0, 0])
    assert scores.text_rows(1, 2)[0].tolist() == pytest.approx([1 / 2])


@given(st.lists(TEXT, min_size=1, max_size=4), st.lists(TEXT, min_size=1, max_size=4))
def test_the_overlap_is_that_of_sets(captions: list[str], texts: list[str]) -> None:
    scores = CaptionScores(captions, texts)
    expected = [
        [len(a & b) / len(a | b) if a | b else 0 for b in map(words, texts)]
        for a in map(words, captions)
    ]
    assert scores.image_rows(0, len(captions)).tolist() == expected
    assert torch.equal(
        scores.text_rows(0, len(texts)).T, torch.tensor(expected, dtype=torch.float64)
    )


def test_a_pixel_vector_knows_neither_brightness_nor_contrast() -> None:
    pixels = np.random.default_rng(0).integers(0, 100, (32, 32)).astype(np.uint8)
    one = pixel_vector(Image.fromarray(pixels))
    other = pixel_vector(Image.fromarray(pixels * 2 + 20))
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-6)
    assert float(one @ other) > 0.999
    assert not pixel_vector(Image.new("L", (9, 9), 77)).any()


def test_an_image_that_stands_in_the_training_data_finds_its_caption(
    classification: Path, tmp_path: Path
) -> None:
    dataset = load_dataset(DatasetConfig(path=str(classification)))
    members = []
    for sample, label in zip(dataset.test.samples, dataset.test.labels(), strict=True):
        caption = f"something {dataset.class_names[label]}".encode()
        members += [(f"{sample.key}.png", sample.image.read()), (f"{sample.key}.txt", caption)]
    half = len(members) // 2
    write_tar(tmp_path / "00000.tar", members[:half])
    write_tar(tmp_path / "00001.tar", members[half:])
    fewer = replace(dataset, parts={"test": dataset.test.without([0])})
    found = find_neighbours([dataset, fewer], tmp_path)
    assert found[0].captions[1:] == found[1].captions
    scores = CaptionScores(found[0].captions, dataset.class_names)
    labels_n = dataset.test.labels()
    metrics = {m.name: m.value for m in accuracies(scores, labels_n, len(dataset.class_names))}
    assert metrics["top1"] == 1


def test_of_equally_near_images_the_first_in_the_tars_counts(
    classification: Path, tmp_path: Path
) -> None:
    dataset = load_dataset(DatasetConfig(path=str(classification)))
    for number, caption in enumerate((b"first", b"second")):
        write_tar(tmp_path / f"{number}.tar", [("a.png", png(0, 0)), ("a.txt", caption)])
    assert set(find_neighbours([dataset], tmp_path)[0].captions) == {"first"}


def test_reference_samples_that_cannot_be_used_are_counted(
    classification: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = load_dataset(DatasetConfig(path=str(classification)))
    good = [("a.png", png(0, 0)), ("a.txt", b"good")]
    bad = [("b.png", b"broken"), ("b.txt", b"bad"), ("c.png", png(1, 1)), ("d.txt", b"no image")]
    write_tar(tmp_path / "0.tar", [*bad, *good])
    found = find_neighbours([dataset], tmp_path)
    assert set(found[0].captions) == {"good"}
    assert "3 of 4 reference samples have no readable image and caption" in capsys.readouterr().err
    write_tar(tmp_path / "0.tar", bad)
    with pytest.raises(DataError, match="holds no readable image with a caption"):
        find_neighbours([dataset], tmp_path)


def test_training_data_may_repeat_a_key(classification: Path, tmp_path: Path) -> None:
    dataset = load_dataset(DatasetConfig(path=str(classification)))
    members = [("a.png", png(0, 0)), ("a.txt", b"one"), ("a.png", png(1, 1)), ("a.txt", b"two")]
    write_tar(tmp_path / "0.tar", members)
    assert set(find_neighbours([dataset], tmp_path)[0].captions) == {"one", "two"}


def test_a_reference_without_tars_is_refused(classification: Path, tmp_path: Path) -> None:
    dataset = load_dataset(DatasetConfig(path=str(classification)))
    with pytest.raises(DataError, match=r"baseline\.reference: there is no tar"):
        find_neighbours([dataset], tmp_path)
