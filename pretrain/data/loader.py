"""Global batches in order: each worker makes whole local batches, the DataLoader keeps their
sequence.

Everything in a batch is a function of (seed, data, position): samples, captions, crops, kept
patches and replacements do not depend on workers, ranks or restarts. A bad image is replaced by a
sample of its own window drawn by hash, named and counted in the batch.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import connection, forkserver, parent_process, resource_tracker
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from configs import draws
from configs.errors import DataError, PairmillError
from pretrain.data.batch import BadSample, Batch, BatchMaker, BatchPlan, SampleForm
from pretrain.data.dataset import Source, Sources
from pretrain.data.mixture import Mixture
from pretrain.data.order import SampleOrder, Window
from pretrain.data.reader import ShardReader, UnusableSampleError
from pretrain.data.remote import Cache, CachePlan, FetchAhead
from pretrain.model.tokenizer import Tokenizer

_NEAR_REPLACEMENTS = 16  # tries within the window: its shards are open, or in the cache
_FAR_REPLACEMENTS = 16  # then anywhere in the source
_PREFETCHED_SAMPLES = 4_096  # a worker holds as many, in whole batches: at least 1, at most 4


class _Opened:
    """One source in a worker: its order, its reader, and where it was last read."""

    def __init__(
        self, source: Source, plan: BatchPlan, form: SampleForm, cache: Cache | None
    ) -> None:
        self.name = source.manifest.name
        self.order = SampleOrder(
            source.manifest.samples_per_shard,
            seed=plan.seed,
            digest=source.manifest.digest,
            window_shards=plan.window_shards,
        )
        self.reader = ShardReader(
            source,
            max_open_shards=max(64, 2 * plan.window_shards),
            cache=cache,
            fetch_ahead=FetchAhead(cache) if cache else None,
            extensions=form.extensions,
            captionless=bool(form.caption.places),
        )
        self._window = -1

    def enter(self, ordinals: npt.NDArray[np.int64]) -> None:
        """Get ready for a batch of samples in ascending order: open their windows, close others."""
        first, last = (self.order.window(int(ordinals[i])) for i in (0, -1))
        if first.first == last.first == self._window:
            return
        windows, position = [first], first.first + first.size
        while position <= last.first:
            windows.append(self.order.window(position))
            position += windows[-1].size
        self.reader.retain(shard for window in windows for shard in window.shards)
        self._window = last.first
        soon = self.order.window(last.first + last.size)
        self.reader.expect([s for window in windows for s in window.shards], soon.shards)


class BatchDataset(Dataset["Batch | PairmillError"]):
    """Item c is this rank's part of the global batch after c samples, or the error that making it
    ended with.

    An error is an item because a DataLoader worker would wrap what it raises in its own traceback.
    """

    def __init__(
        self,
        sources: Sources,
        form: SampleForm,
        tokenizer: Tokenizer,
        plan: BatchPlan,
        cache: CachePlan | None = None,
    ) -> None:
        self._sources = sources
        self._form = form
        self._tokenizer = tokenizer
        self._cache = cache
        self.plan = plan
        self._mixture = Mixture([source.weight for source in sources])
        self._opened: list[_Opened] = []  # in the worker: descriptors and threads do not travel

    def __getitem__(self, consumed: int) -> Batch | PairmillError:
        """Read, decode and tokenize the local part of the global batch after `consumed` samples."""
        try:
            return self.batch(consumed)
        except PairmillError as error:
            return error

    def batch(self, consumed: int) -> Batch:
        """Return the local part of the global batch after `consumed` samples; raise DataError."""
        if not self._opened:
            self._open()
        plan, form = self.plan, self._form
        positions = plan.positions(consumed)
        source, ordinal = self._mixture.split(positions)
        shard, row = np.empty_like(ordinal), np.empty_like(ordinal)
        for i in np.unique(source):
            chosen = source == i
            self._opened[i].enter(ordinal[chosen])
            shard[chosen], row[chosen] = self._opened[i].order.locate(ordinal[chosen])
        maker = BatchMaker(form, form.caption, plan.seed, positions)
        bad: list[BadSample] = []
        for i, position in enumerate(positions.tolist()):
            opened = self._opened[source[i]]
            place = (int(shard[i]), int(row[i]))
            self._fill(maker, i, opened, place, (position, int(ordinal[i])), bad)
        return maker.batch(self._tokenizer, plan, bad)

    def _open(self) -> None:
        cache = None
        if any(source.is_remote for source in self._sources):
            assert self._cache is not None, "remote shards need a cache"
            cache = Cache(self._cache)
        self._opened = [_Opened(s, self.plan, self._form, cache) for s in self._sources]

    def _fill(
        self,
        maker: BatchMaker,
        i: int,
        opened: _Opened,
        place: tuple[int, int],
        position: tuple[int, int],
        bad: list[BadSample],
    ) -> None:
        """Put the sample at `place` into row i, or the first usable one of a sequence that is drawn
        by position: from its own window first, then from all of its source.
        """
        for attempt in range(_NEAR_REPLACEMENTS + _FAR_REPLACEMENTS):
            try:
                maker.put(i, opened.reader.read(*place))
                return
            except UnusableSampleError as error:
                bad.append(
                    BadSample(position[0], opened.name, error.key, error.kind, error.problem)
                )
            word = int(draws.bits(self.plan.seed, "loader/replacement", position[0], attempt))
            window: Window | None = None
            if attempt < _NEAR_REPLACEMENTS:
                window = opened.order.window(position[1])
            first, size = window[:2] if window else (0, opened.order.num_samples)
            place = opened.order.at(first + word % size)
        raise DataError(
            f"{_NEAR_REPLACEMENTS + _FAR_REPLACEMENTS} samples in a row could not be used, the "
            f"last one {bad[-1].key} ({bad[-1].problem}). Curate the dataset: most of it is "
            "damaged."
        )


class _Starts(Sampler[int]):
    def __init__(self, starts: Sequence[int]) -> None:
        self._starts = starts

    def __iter__(self) -> Iterator[int]:
        return iter(self._starts)

    def __len__(self) -> int:
        return len(self._starts)


def _end_with_trainer() -> None:
    """End this worker as soon as the process that made its DataLoader is gone, however it went.

    torch's own watch asks whether the parent process changed. A worker's parent is the fork server,
    which ends when nobody holds the other end of its pipe; but each worker holds one, so that they
    would keep each other alive. The sentinel is a pipe that the trainer alone holds.
    """
    parent = parent_process()
    assert parent is not None, "a worker is a child of the fork server"
    connection.wait([parent.sentinel])
    os._exit(1)  # at once: the main thread may be in a read, or waiting for room in its queue


def _start_worker(environment: dict[str, str], worker: int) -> None:
    """Give a worker its rank's environment (the fork server's is older: it may lack credentials
    set since) and tie its life to its rank's: it lives through a signal to the whole group, since
    the rank still needs its batches, and ends with the rank.
    """
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with_trainer, name="trainer watch", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is one thread of many


def _start_fork_server() -> None:
    """Start the fork server deaf to the stop signals; ignored signals stay so through exec.

    It imports once what every worker needs: they start in no time.
    """
    forkserver.set_forkserver_preload([__name__])
    deaf = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        resource_tracker.ensure_running()
        forkserver.ensure_running()
    finally:
        for number, handler in deaf.items():
            signal.signal(number, handler)


def _as_it_is(batch: Batch | PairmillError) -> Batch | PairmillError:
    return batch


def loader_options(plan: BatchPlan, num_workers: int) -> dict[str, Any]:
    """Return the options of a DataLoader whose items are whole local batches of `plan`."""
    options: dict[str, Any] = {
        "batch_size": None,
        "num_workers": num_workers,
        "collate_fn": _as_it_is,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator(),  # its own: the global generator's state is the run's
    }
    if num_workers:
        _start_fork_server()
        local = plan.global_batch_size // plan.world_size
        options |= {
            "prefetch_factor": min(4, max(1, _PREFETCHED_SAMPLES // local)),
            # fork would copy the threads' locks of DeepSpeed and tokenizers: start clean processes
            "multiprocessing_context": "forkserver",
            "worker_init_fn": partial(_start_worker, dict(os.environ)),
        }
    return options


def batches(
    dataset: BatchDataset, *, first: int, last: int, num_workers: int
) -> Iterator[Batch | PairmillError]:
    """Yield this rank's parts of the global batches over samples consumed [first, last), in order.

    In the place of a batch that cannot be made comes the error.
    """
    starts = _Starts(range(first, last, dataset.plan.global_batch_size))
    loader: DataLoader[Batch | PairmillError] = DataLoader(
        dataset, sampler=starts, **loader_options(dataset.plan, num_workers)
    )
    yield from loader
