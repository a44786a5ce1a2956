"""Examples for the report: what a text finds among the pictures, and a picture among the texts.

Queries are chosen by hash, so that nobody picks the pretty ones and every checkpoint shows the
same. Pictures are stored small, inside the file (docs/formats.md, Retrieval examples).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from configs import draws
from evaluation.dataset import EvaluationDataset, ImageSample, Part
from evaluation.images import read_image
from evaluation.json_list import Json, JsonList
from evaluation.ranking import Scores

EXAMPLES_FILE = "examples.json"
NUM_QUERIES = 12
NUM_ANSWERS = 5
MAX_SIDE_PIXELS = 64
IntArray = npt.NDArray[np.int64]


def small_png(sample: ImageSample) -> str:
    """Return the picture as base64 PNG, its longer side at most MAX_SIDE_PIXELS."""
    image = read_image(sample.image)
    image.thumbnail((MAX_SIDE_PIXELS, MAX_SIDE_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def candidate_texts(dataset: EvaluationDataset, part: Part) -> tuple[str, ...]:
    """Return what images are compared with: class names, or captions."""
    return dataset.class_names if dataset.prompts is not None else part.captions


def retrieval_examples(
    checkpoint: str, dataset: EvaluationDataset, part: Part, scores: Scores, *, seed: int
) -> Json:
    """Return up to 12 texts with their 5 nearest pictures, and 12 pictures with their texts.

    In a classification dataset a text is a class name, and right is a picture of that class.
    """
    texts = candidate_texts(dataset, part)
    if dataset.prompts is not None:
        image_id_n, text_id_m = part.labels(), np.arange(len(texts))
    else:
        image_id_n, text_id_m = np.arange(len(part.samples)), part.image_of_caption_m

    def picture(position: int) -> Json:
        sample = part.samples[position]
        return {"key": sample.key, "png": small_png(sample)}

    by_text = [
        {
            "text": texts[text],
            "images": [
                {**picture(i), "score": score, "right": bool(image_id_n[i] == text_id_m[text])}
                for i, score in _nearest(scores.text_rows(text, text + 1))
            ],
        }
        for text in _chosen(len(texts), seed, "evaluation/example texts")
    ]
    by_image = [
        {
            "image": picture(image),
            "own_texts": [texts[j] for j in np.flatnonzero(text_id_m == image_id_n[image])],
            "texts": [
                {"text": texts[j], "score": score, "right": bool(text_id_m[j] == image_id_n[image])}
                for j, score in _nearest(scores.image_rows(image, image + 1))
            ],
        }
        for image in _chosen(len(part.samples), seed, "evaluation/example images")
    ]
    return {
        "checkpoint": checkpoint,
        "dataset": dataset.name,
        "task": dataset.task,
        "text_to_image": by_text,
        "image_to_text": by_image,
    }


def _chosen(num_queries: int, seed: int, purpose: str) -> list[int]:
    return [int(i) for i in draws.permutation(num_queries, seed, purpose)[:NUM_QUERIES]]


def _nearest(row_1m: Tensor) -> list[tuple[int, float]]:
    """Return the positions and scores of the highest scores; equal ones in their order."""
    row = row_1m[0].double().numpy()
    order = np.argsort(-row, kind="stable")[:NUM_ANSWERS]
    return [(int(i), round(float(row[i]), 6)) for i in order]


def read_examples(folder: Path) -> list[Json]:
    """Return the examples that stand in a folder; none where nothing was published yet."""
    return _FILE.read(folder)


def publish_examples(folder: Path, new: Sequence[Json]) -> Path:
    """Merge the examples into the folder's examples.json; those of other checkpoints stay."""
    return _FILE.publish(folder, new, indent=1)


def _order(example: Json) -> tuple[str, str, str]:
    return example["dataset"], example["task"], example["checkpoint"]


_FILE = JsonList(EXAMPLES_FILE, "retrieval examples", _order)
