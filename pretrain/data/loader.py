"""Global batches in order: each worker makes whole local batches, the DataLoader keeps their
sequence.

Everything in a batch is a function of (seed, manifest, position): samples, crops, kept patches and
replacements do not depend on workers, ranks or restarts. A bad image is replaced by a sample drawn
by hash, named and counted in the batch.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from configs import draws
from configs.errors import DataError, PairmillError
from curation.manifest import Manifest
from pretrain.data.decode import ImageTransform, UndecodableImageError
from pretrain.data.order import SampleOrder
from pretrain.data.reader import RawSample, ShardReader, UnusableSampleError
from pretrain.model.tokenizer import Tokenizer
from pretrain.reduction.image import random_patches

_MAX_REPLACEMENTS = 16


class BadSample(NamedTuple):
    """A sample that could not be used at this position, and why."""

    position: int
    key: str
    problem: str


class Batch(NamedTuple):
    """The local part of one global batch: uint8 pixels, token ids, kept patches."""

    image_b3HW: Tensor
    token_bL: Tensor
    kept_bK: Tensor | None
    key: list[str]
    bad: list[BadSample]


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How positions are cut into batches for one rank."""

    seed: int
    global_batch_size: int
    rank: int
    world_size: int
    window_shards: int
    num_patches: int
    mask_ratio: float

    def positions(self, step: int) -> npt.NDArray[np.int64]:
        """Return the positions of this rank's part of global batch `step`."""
        local = self.global_batch_size // self.world_size
        start = step * self.global_batch_size + self.rank * local
        return np.arange(start, start + local, dtype=np.int64)


class BatchDataset(Dataset["Batch | PairmillError"]):
    """Item k is this rank's part of global batch k, or the error that making it ended with.

    An error is an item because a DataLoader worker would wrap what it raises in its own traceback.
    """

    def __init__(
        self, manifest: Manifest, transform: ImageTransform, tokenizer: Tokenizer, plan: BatchPlan
    ) -> None:
        self._manifest = manifest
        self._transform = transform
        self._tokenizer = tokenizer
        self._plan = plan
        self._order: SampleOrder | None = None  # made in the worker: its caches do not travel
        self._reader: ShardReader | None = None

    def __getitem__(self, step: int) -> Batch | PairmillError:
        """Read, decode and tokenize the local part of global batch `step`."""
        try:
            return self.batch(step)
        except PairmillError as error:
            return error

    def batch(self, step: int) -> Batch:
        """Return the local part of global batch `step`; raise DataError."""
        if self._order is None or self._reader is None:
            manifest, plan = self._manifest, self._plan
            self._order = SampleOrder(
                manifest.samples_per_shard,
                seed=plan.seed,
                digest=manifest.digest,
                window_shards=plan.window_shards,
            )
            self._reader = ShardReader(manifest, max_open_shards=2 * plan.window_shards)
        plan = self._plan
        positions = plan.positions(step)
        place = self._order.locate(positions)
        drawn = self._transform.draw(plan.seed, positions)
        bad: list[BadSample] = []
        samples = [
            self._usable(int(positions[i]), (int(place.shard[i]), int(place.row[i])), drawn[i], bad)
            for i in range(len(positions))
        ]
        images, captions, keys = zip(*samples, strict=True)
        kept = None
        if plan.mask_ratio > 0:
            kept = torch.from_numpy(
                random_patches(plan.seed, positions, plan.num_patches, plan.mask_ratio)
            )
        pixels = torch.from_numpy(np.stack(images))
        return Batch(pixels, self._tokenizer(captions), kept, list(keys), bad)

    def _usable(
        self,
        position: int,
        place: tuple[int, int],
        drawn: npt.NDArray[np.float64],
        bad: list[BadSample],
    ) -> tuple[npt.NDArray[np.uint8], str, str]:
        """Return the decoded sample, or the first decodable one of a sequence drawn by position."""
        assert self._reader is not None
        assert self._order is not None
        for attempt in range(_MAX_REPLACEMENTS):
            try:
                sample = self._reader.read(*place)
                image = self._decode(sample, drawn)
                return image, sample.caption, sample.key
            except UnusableSampleError as error:
                bad.append(BadSample(position, error.key, error.problem))
            word = draws.bits(self._plan.seed, "loader/replacement", position, attempt)
            place = self._order.at(int(word) % self._order.num_samples)
        raise DataError(
            f"{_MAX_REPLACEMENTS} samples in a row could not be decoded, the last one "
            f"{bad[-1].key} ({bad[-1].problem}). Curate the dataset: most of its images are "
            "damaged."
        )

    def _decode(self, sample: RawSample, drawn: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
        try:
            return self._transform(sample.image, drawn)
        except UndecodableImageError as error:
            raise UnusableSampleError(sample.key, str(error)) from None


class _Steps(Sampler[int]):
    def __init__(self, first: int, last: int) -> None:
        self._steps = range(first, last)

    def __iter__(self) -> Iterator[int]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)


def _ignore_stop_signals(worker: int) -> None:
    """Let a worker live through a signal to the whole group: its rank still needs its batches."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _start_fork_server() -> None:
    """Start the fork server deaf to the stop signals; ignored signals stay so through exec."""
    deaf = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        resource_tracker.ensure_running()
        forkserver.ensure_running()
    finally:
        for number, handler in deaf.items():
            signal.signal(number, handler)


def batches(
    dataset: BatchDataset, *, first: int, last: int, num_workers: int
) -> Iterator[Batch | PairmillError]:
    """Yield this rank's part of global batches [first, last) in order, or the error instead."""
    if num_workers:
        _start_fork_server()
    loader: DataLoader[Batch | PairmillError] = DataLoader(
        dataset,
        batch_size=None,
        sampler=_Steps(first, last),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if num_workers else None,
        # fork would copy the threads' locks of DeepSpeed and tokenizers: start clean processes
        multiprocessing_context="forkserver" if num_workers else None,
        worker_init_fn=_ignore_stop_signals if num_workers else None,
        generator=torch.Generator(),  # its own: the global generator's state is the run's
    )
    yield from loader
