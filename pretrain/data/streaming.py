"""`source: streaming`: webdataset's own pipeline, for remote or piped tars that have no index.

Shards are drawn with replacement, so ranks and workers never run out or wait for each other. What
is drawn by position (crops, masks, captions) is the same as ever, but which sample stands at a
position is not: it depends on the numbers of ranks and workers, and a resumed run goes on with
other shards. Use a manifest where that matters. URLs are opened by fsspec; `pipe:COMMAND` runs a
shell command, which the configuration must allow.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset import filters, tariterators
from webdataset.gopen import gopen
from webdataset.shardlists import ResampledShards

from configs import draws
from configs.errors import DataError, PairmillError
from pretrain.data.batch import BadSample, Batch, BatchMaker, BatchPlan, SampleForm
from pretrain.data.captions import CaptionChoice
from pretrain.data.loader import loader_options
from pretrain.data.reader import RawSample, UnusableSampleError
from pretrain.model.tokenizer import Tokenizer

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
_DEFAULT_CAPTION = CaptionChoice(places=(("txt|json:caption", 1.0),))
_SHUFFLE_BUFFER = 2_000  # samples, as they stand in the tar
_MAX_FAILURES = 50  # shards in a row that cannot be read


@dataclass(frozen=True)
class Stream:
    """The tars of a streamed run: what there is in place of manifests."""

    urls: tuple[str, ...]

    @property
    def num_samples(self) -> None:
        """Not known before they are read."""
        return None

    @property
    def digest(self) -> str:
        """The identity of the data as far as it is known: a hash of the URLs."""
        return hashlib.sha256("\n".join(self.urls).encode()).hexdigest()

    def describe(self) -> str:
        """Name the tars in words."""
        return f"{len(self.urls):,} streamed tars ({self.urls[0]}, ...), not resumable to a sample"


class StreamDataset(IterableDataset["Batch | PairmillError"]):
    """This rank's parts of the global batches over samples consumed [first, last)."""

    def __init__(
        self, stream: Stream, form: SampleForm, tokenizer: Tokenizer, plan: BatchPlan
    ) -> None:
        self._stream = stream
        caption = form.caption if form.caption.places else _DEFAULT_CAPTION
        self._form, self._caption = form, caption
        self._tokenizer = tokenizer
        self.plan = plan
        self.span = (0, 0)

    def __iter__(self) -> Iterator[Batch | PairmillError]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        first, last = self.span
        size = self.plan.global_batch_size
        samples = self._samples(first, number)
        for consumed in range(first + number * size, last, count * size):
            try:
                yield self._batch(consumed, samples)
            except PairmillError as error:
                yield error
                return

    def _batch(self, consumed: int, samples: Iterator[dict[str, Any]]) -> Batch:
        positions = self.plan.positions(consumed)
        maker = BatchMaker(self._form, self._caption, self.plan.seed, positions)
        bad: list[BadSample] = []
        for i, position in enumerate(positions.tolist()):
            while True:
                sample = next(samples)
                try:
                    maker.put(i, self._raw(sample))
                    break
                except UnusableSampleError as error:
                    url = str(sample["__url__"])
                    bad.append(BadSample(position, url, error.key, error.kind, error.problem))
                    if len(bad) > 10 * len(positions) + 100:
                        raise DataError(
                            f"{len(bad)} samples of one batch could not be used, the last one "
                            f"{error.key} ({error.problem}). Most of {url} is damaged."
                        ) from None
        return maker.batch(self._tokenizer, self.plan, bad)

    def _raw(self, sample: dict[str, Any]) -> RawSample:
        key = f"{str(sample['__url__']).rpartition('/')[2]}:{sample['__key__']}"
        image = next((sample[ext] for ext in IMAGE_EXTENSIONS if ext in sample), None)
        if image is None:
            raise UnusableSampleError(key, "no image", "no image")
        return RawSample(key, [], image, sample)

    def _samples(self, first: int, worker: int) -> Iterator[dict[str, Any]]:
        seed = int(draws.bits(self.plan.seed, "streaming", first, self.plan.rank, worker)) >> 33
        failures = 0

        def report(error: Exception) -> bool:
            nonlocal failures
            failures += 1
            if failures >= _MAX_FAILURES:
                raise DataError(
                    f"{failures} shards in a row could not be read, the last time with "
                    f"{type(error).__name__}: {error}. Check data.urls."
                ) from None
            if failures in (1, 10):
                print(f"WARNING: a shard is passed over: {error}", file=sys.stderr, flush=True)
            return True

        shards = ResampledShards(list(self._stream.urls), seed=seed, deterministic=True)
        opened = _opened(iter(shards), report)
        members = tariterators.tar_file_expander(opened, handler=report)
        samples = tariterators.group_by_keys(members, handler=report)
        for sample in filters._shuffle(samples, bufsize=_SHUFFLE_BUFFER, initial=100, seed=seed):
            failures = 0
            yield sample


def _opened(shards: Iterator[dict[str, Any]], report: Any) -> Iterator[dict[str, Any]]:
    for shard in shards:
        url = shard["url"]
        try:
            piped = url.startswith("pipe:")
            stream = gopen(url) if piped else fsspec.open(url, "rb").open()
        except Exception as error:  # every file system raises its own
            report(error)
            continue
        with stream:
            yield {"url": url, "stream": stream}


def stream_batches(
    dataset: StreamDataset, *, first: int, last: int, num_workers: int
) -> Iterator[Batch | PairmillError]:
    """Yield this rank's parts of the global batches over samples consumed [first, last)."""
    dataset.span = (first, last)
    loader: DataLoader[Batch | PairmillError] = DataLoader(
        dataset, **loader_options(dataset.plan, num_workers)
    )
    yield from loader
