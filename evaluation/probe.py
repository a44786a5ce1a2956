"""Where a model puts a fixed set of test images, at each evaluation while it trains.

    OUTPUT/probe/DATASET/images.json                 {keys, labels}: a class's name or a caption
    OUTPUT/probe/DATASET/samples-000000012800.npy    float32 [P, D], as the scores take them

`pairmill report` draws a map of them over time. The images are the first by the hash of their
names. A run that goes back writes the same names again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from torch import Tensor

from configs.publish import publish_text, published_file
from evaluation.dataset import EvaluationDataset, IntArray

NUM_IMAGES = 512
MAX_LABEL_CHARACTERS = 80


def write_probe(
    folder: Path, dataset: EvaluationDataset, embedded_nD: Tensor, samples_seen: int
) -> None:
    """Publish the embedded test images [n, D] of the probe set at `samples_seen`."""
    chosen_p = probe_images([sample.key for sample in dataset.test.samples])
    place = folder / dataset.name.replace("/", "_")
    with published_file(place / f"samples-{samples_seen:012d}.npy") as file:
        np.save(file, embedded_nD[chosen_p].float().numpy(), allow_pickle=False)
    keys = [dataset.test.samples[i].key for i in chosen_p]
    content = {"keys": keys, "labels": _labels(dataset, chosen_p)}
    publish_text(place / "images.json", json.dumps(content, ensure_ascii=False))


def probe_images(keys: list[str]) -> IntArray:
    """Return the positions [P] of the probe set, ascending."""

    def by_hash(position: int) -> bytes:
        return hashlib.blake2b(keys[position].encode("utf-8", "replace"), digest_size=8).digest()

    return np.sort(np.array(sorted(range(len(keys)), key=by_hash)[:NUM_IMAGES], dtype=np.int64))


def _labels(dataset: EvaluationDataset, chosen_p: IntArray) -> list[str]:
    part = dataset.test
    if part.labels_n is not None and dataset.class_names:
        names = [dataset.class_names[part.labels_n[i]] for i in chosen_p]
    else:
        first = dict(zip(reversed(part.image_of_caption_m), reversed(part.captions), strict=True))
        names = [first.get(i, "") for i in chosen_p]
    return [name[:MAX_LABEL_CHARACTERS] for name in names]
