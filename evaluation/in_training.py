"""Judge a model while it trains: zero-shot and retrieval on the datasets of a suite, by all ranks.

Rank r of W encodes batches r, r + W, ... of images and texts; then every rank has all features and
comes to the same numbers. The pictures are decoded once and kept (3 * side ** 2 bytes each, over
all ranks). For intervals, other methods and other checkpoints there is `pairmill evaluate`.

Legend: n images, m texts, u of them distinct, L tokens, D embedding width, b a batch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from configs.errors import ConfigError, DataError
from evaluation.config import EvaluateConfig
from evaluation.dataset import EvaluationDataset
from evaluation.datasets import check_any, load_datasets
from evaluation.images import UndecodableImageError, read_image
from evaluation.methods.retrieval import recalls
from evaluation.methods.zero_shot import accuracies
from evaluation.probe import write_probe
from evaluation.ranking import FeatureScores
from evaluation.statistics import Metric
from evaluation.world import World
from pretrain.model.clip import open_clip
from pretrain.model.tokenizer import Tokenizer
from pretrain.model.view import ModelView


@dataclass
class _Judged:
    """A dataset and this rank's pictures of it, by batch, for one image size."""

    dataset: EvaluationDataset
    pixels: dict[int, Tensor] = field(default_factory=dict)
    image_size: int = 0


class InTraining:
    """Evaluates a ModelView; see pretrain.model.view."""

    def __init__(self, config: EvaluateConfig, probe_folder: Path | None = None) -> None:
        """List the datasets; with a `probe_folder` rank 0 writes there where images lie.

        Raises DataError where a dataset is not there (where that is only reported: no one is),
        ConfigError where its task cannot be done while training.
        """
        self._probe_folder = probe_folder
        self._batch = config.batch_size
        datasets, absent = load_datasets(config)
        check_any(config, len(datasets))
        for one in absent if os.environ.get("RANK", "0") == "0" else ():
            print(f"absent: {one.config.label}: {one.reason}", file=sys.stderr)
        for section, dataset in datasets:
            if dataset.task not in ("zero_shot", "retrieval"):
                raise ConfigError(
                    f"{section.label}: got the task {dataset.task}; while training, zero_shot and "
                    "retrieval can be done. Leave it out of evaluation.suite, and use `pairmill "
                    "evaluate` on the checkpoints."
                )
        self._judged = [_Judged(dataset) for _, dataset in datasets]

    def __call__(self, view: ModelView) -> dict[str, float]:
        """Return `DATASET/METRIC` -> value; every rank must call it, and gets the same."""
        found: dict[str, float] = {}
        for judged in self._judged:
            dataset, test = judged.dataset, judged.dataset.test
            token_uL, of_text_m = _tokens(dataset, view.tokenizer)
            image_nD, text_uD = self._features(view, judged, token_uL)
            similarity = view.similarity
            embedded_nD = similarity.embed_image(image_nD)
            self._write_probe(view, dataset, embedded_nD)
            metrics: Sequence[Metric]
            if dataset.prompts is not None:
                parts = torch.split(text_uD[of_text_m], _prompts_a_class(dataset))
                vectors = [similarity.class_vectors(part[None]) for part in parts]
                scores = FeatureScores(embedded_nD, torch.cat(vectors), similarity)
                metrics = accuracies(scores, test.labels(), len(dataset.class_names))
            else:
                text_mD = similarity.embed_text(text_uD[of_text_m])
                scores = FeatureScores(embedded_nD, text_mD, similarity)
                metrics = recalls(scores, test.image_of_caption_m)
            found |= {f"{dataset.name}/{metric.name}": metric.value for metric in metrics}
        return found

    def _write_probe(
        self, view: ModelView, dataset: EvaluationDataset, embedded_nD: Tensor
    ) -> None:
        if self._probe_folder is None:
            return
        error = None
        if view.group.rank == 0:
            try:
                write_probe(self._probe_folder, dataset, embedded_nD, view.samples_seen)
            except OSError as caught:
                error = caught
        World(view.group.rank, view.group.size).together(error)

    def _features(
        self, view: ModelView, judged: _Judged, token_uL: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return raw features [n, D] of images and [u, D] of texts on the host."""
        num_images, batch = len(judged.dataset.test.samples), self._batch
        num_batches = -(-max(num_images, len(token_uL)) // batch)
        rank, size = view.group.rank, view.group.size
        rounds = -(-num_batches // size)  # equally many calls on every rank
        self._decode(view, judged, range(rank, -(-num_images // batch), size))
        blank = torch.zeros((batch, 3, view.image_size, view.image_size), dtype=torch.uint8)
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for number in range(rank, rounds * size, size):
            chosen = token_uL[number * batch : (number + 1) * batch]
            token_bL = torch.cat([chosen, token_uL[:1].expand(batch - len(chosen), -1)])
            pair = view.encode(judged.pixels.get(number, blank), token_bL)
            for features, part in zip(found, pair, strict=True):
                features.append(part)
        image_nD, text_uD = (self._in_order(view, torch.stack(parts)) for parts in found)
        return image_nD[:num_images], text_uD[: len(token_uL)]

    def _in_order(self, view: ModelView, own_kbD: Tensor) -> Tensor:
        """Return the features of all ranks' batches [k * W * b, D] in the order of the batches."""
        rounds, batch, width = own_kbD.shape
        gathered = view.group.gather(own_kbD.reshape(rounds * batch, width))
        by_rank = gathered.reshape(view.group.size, rounds, batch, width)
        return by_rank.transpose(0, 1).reshape(-1, width).cpu()

    def _decode(self, view: ModelView, judged: _Judged, numbers: Sequence[int]) -> None:
        error = None
        if judged.image_size != view.image_size:
            judged.pixels.clear()
            try:
                for number in numbers:
                    judged.pixels[number] = self._pixels(view, judged.dataset, number)
            except (DataError, OSError) as caught:
                error = caught
            judged.image_size = view.image_size
        World(view.group.rank, view.group.size).together(error)

    def _pixels(self, view: ModelView, dataset: EvaluationDataset, number: int) -> Tensor:
        size = self._batch
        samples = dataset.test.samples[number * size : (number + 1) * size]
        preprocess = open_clip.transform.PreprocessCfg(size=view.image_size)
        transform = open_clip.transform.image_transform_v2(preprocess, is_train=False)
        resize = transform.transforms[:-2]  # all but ToTensor and Normalize: the model does them
        pixels = torch.zeros((size, 3, view.image_size, view.image_size), dtype=torch.uint8)
        for i, sample in enumerate(samples):
            try:
                image = read_image(sample.image)
            except UndecodableImageError as error:
                raise DataError(
                    f"{dataset.name}: {sample.key} cannot be decoded ({error}); leave the dataset "
                    "out of evaluation.suite, or mend it."
                ) from None
            for step in resize:
                image = step(image)
            pixels[i] = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        return pixels


def _tokens(dataset: EvaluationDataset, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Return the distinct token rows [u, L] of a dataset, and which of them each prompt or caption
    is: texts that the model cannot tell apart are encoded once, and tie exactly.
    """
    if dataset.prompts is not None:
        labels = range(len(dataset.class_names))
        texts = [text for label in labels for text in dataset.prompts.of(label)]
    else:
        texts = list(dataset.test.captions)
    token_uL, of_text_m = torch.unique(tokenizer(texts), dim=0, return_inverse=True)
    return token_uL, of_text_m


def _prompts_a_class(dataset: EvaluationDataset) -> list[int]:
    assert dataset.prompts is not None, "a dataset without classes"
    return [len(dataset.prompts.of(label)) for label in range(len(dataset.class_names))]
