"""What pixels alone give: the nearest training image's caption against each candidate text.

Each test image, as a gray 16 x 16 vector of zero mean and length 1, finds the nearest image of a
reference dataset (the training data). Its score for a candidate text (a class name, a caption) is
the word overlap |A and B| / |A or B| (Jaccard) of that neighbour's caption A and the text B, as
sets of lower-cased words. The scores run through the same metric code as a model's. A model that is
not well above this has learned little that the training captions do not say by themselves.

Legend: n test images, m candidate texts, r reference images, P = 256 pixels.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from configs.errors import DataError
from configs.progress import progress
from evaluation.dataset import EvaluationDataset, Part
from evaluation.features import keep_decodable
from evaluation.images import UndecodableImageError, read_image
from evaluation.tar import Span, TarSample, digest_files, scan_tar

SIDE_PIXELS = 16
_BATCH = 1024
FloatArray = npt.NDArray[np.float32]
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Neighbours:
    """A test split (less its undecodable images) and each image's nearest neighbour's caption."""

    dataset: EvaluationDataset
    part: Part
    captions: tuple[str, ...]


def words(text: str) -> frozenset[str]:
    """Return the lower-cased words of a text: runs of letters, digits and underscores."""
    return frozenset(_WORD.findall(text.lower()))


def pixel_vector(image: Image.Image) -> FloatArray:
    """Return P gray values of zero mean and length 1 (all 0 where the picture is one tone)."""
    small = image.convert("L").resize((SIDE_PIXELS, SIDE_PIXELS), Image.Resampling.BOX)
    vector = np.asarray(small, dtype=np.float32).ravel()
    vector -= vector.mean()
    length = np.linalg.norm(vector)
    if length > 0:
        vector /= length
    return vector


class CaptionScores:
    """Word overlap of each image's caption with each text, as ranking.Scores."""

    def __init__(self, image_captions: Sequence[str], texts: Sequence[str]) -> None:
        self.num_images = len(image_captions)
        self.num_texts = len(texts)
        self._image_words = [words(caption) for caption in image_captions]
        self._text_words = [words(text) for text in texts]

    def image_rows(self, start: int, stop: int) -> Tensor:
        """Return the overlaps of images start..stop with every text [b, num_texts]."""
        return _overlaps(self._image_words[start:stop], self._text_words)

    def text_rows(self, start: int, stop: int) -> Tensor:
        """Return the overlaps of texts start..stop with every image [b, num_images]."""
        return _overlaps(self._text_words[start:stop], self._image_words)


def _overlaps(rows: Sequence[frozenset[str]], columns: Sequence[frozenset[str]]) -> Tensor:
    """Return the Jaccard index of each row's set with each column's; 0 for empty sets."""
    posting: dict[str, list[int]] = {}
    for column, members in enumerate(columns):
        for word in sorted(members):
            posting.setdefault(word, []).append(column)
    postings = {word: np.asarray(where) for word, where in posting.items()}
    sizes = np.asarray([len(members) for members in columns])
    overlap = np.zeros((len(rows), len(columns)))
    for i, members in enumerate(rows):
        hit = [postings[word] for word in members if word in postings]
        if not hit:
            continue
        common = np.bincount(np.concatenate(hit), minlength=len(columns))
        overlap[i] = common / (len(members) + sizes - common)
    return torch.from_numpy(overlap)


def reference_tars(folder: Path) -> list[Path]:
    """Return the reference dataset's tars, by name. Raises DataError where there are none."""
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError(
            f"baseline.reference: there is no tar in {folder}; expected a folder of WebDataset "
            "tars with "
            "images and captions, such as a dataset that `pairmill curate` wrote."
        )
    return tars


def reference_digest(folder: Path) -> str:
    """Return the sha256 over the reference's tars: the identity of the baseline's "weights"."""
    return digest_files(reference_tars(folder), folder)


def find_neighbours(
    datasets: Sequence[EvaluationDataset], reference: Path, *, max_undecodable: int = 0
) -> list[Neighbours]:
    """Find every test image's nearest reference image, in one pass over the reference.

    Equally near images: the first in tar order. Reference images that cannot be decoded, or have no
    caption, are left out and counted on stderr.
    """
    kept: list[Part] = []
    vectors: list[FloatArray] = []
    for dataset in datasets:
        part = dataset.test
        vector_nP, undecodable = _vectors([sample.image for sample in part.samples])
        kept.append(keep_decodable(dataset.name, part, undecodable, max_undecodable))
        vectors.append(vector_nP)
    captions = _nearest_captions(np.concatenate(vectors), reference)
    ends = np.cumsum([len(part.samples) for part in kept])
    return [
        Neighbours(dataset, part, tuple(captions[end - len(part.samples) : end]))
        for dataset, part, end in zip(datasets, kept, ends, strict=True)
    ]


def _vectors(spans: Sequence[Span]) -> tuple[FloatArray, dict[int, str]]:
    """Return the vectors of the decodable images, and the reasons of the others by position."""
    vectors = []
    undecodable = {}
    for position, span in enumerate(spans):
        try:
            vectors.append(pixel_vector(read_image(span)))
        except UndecodableImageError as error:
            undecodable[position] = str(error)
    shape = (len(vectors), SIDE_PIXELS**2)
    return np.asarray(vectors, dtype=np.float32).reshape(shape), undecodable


def _captioned(samples: Sequence[TarSample]) -> Iterator[tuple[Span, str]]:
    for sample in samples:
        if sample.images and "txt" in sample.members:
            yield sample.images[0], sample.text("txt") or ""


def _nearest_captions(test_nP: FloatArray, reference: Path) -> list[str]:
    tars = reference_tars(reference)
    best_n = np.full(len(test_nP), -np.inf, dtype=np.float32)
    captions = [""] * len(test_nP)
    num_read = num_used = 0
    with progress("pixel baseline", total=len(tars), unit="reference tars") as bar:
        for tar in tars:
            samples = scan_tar(tar, may_repeat_keys=True)
            pairs = list(_captioned(samples))
            for start in range(0, len(pairs), _BATCH):
                part = pairs[start : start + _BATCH]
                num_used += _improve(test_nP, part, best_n, captions)
            num_read += len(samples)
            bar.advance(1, samples=len(samples))
    if num_used < num_read:
        print(
            f"warning: pixel baseline: {num_read - num_used:,} of {num_read:,} reference samples "
            "have no "
            "readable image and caption; left out",
            file=sys.stderr,
        )
    if num_used == 0:
        raise DataError(
            f"baseline.reference: {reference} holds no readable image with a caption (.txt); "
            f"{num_read:,} samples read. Point it at the training data."
        )
    return captions


def _improve(
    test_nP: FloatArray, pairs: Sequence[tuple[Span, str]], best_n: FloatArray, captions: list[str]
) -> int:
    """Take nearer neighbours from `pairs`; return how many of these were readable."""
    reference_rP, undecodable = _vectors([span for span, _ in pairs])
    texts = [text for position, (_, text) in enumerate(pairs) if position not in undecodable]
    if not texts:
        return 0
    for start in range(0, len(test_nP), _BATCH):
        score_br = test_nP[start : start + _BATCH] @ reference_rP.T
        nearest_b = score_br.argmax(axis=1)
        score_b = score_br[np.arange(len(score_br)), nearest_b]
        for i in np.flatnonzero(score_b > best_n[start : start + _BATCH]):
            best_n[start + i] = score_b[i]
            captions[start + i] = texts[nearest_b[i]]
    return len(texts)
