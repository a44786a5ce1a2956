"""What runs in an actor: pictures decoded ahead in threads, the model over batches of them.

    reader thread -> decoding threads (decode, look, preprocess) -> this thread (the model)

A batch is `batch_size` consecutive samples of the shard, so that what the model computes does not
depend on workers or on what was scored before. torch is imported only where a score needs a model.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from configs.errors import CheckpointError, DataError
from curation.scoring import RawSample, Scores
from evaluation.images import UndecodableImageError, decode_image
from evaluation.tar import MAX_IMAGE_BYTES
from tools.score.base import Batch, Picture, Score
from tools.score.ocr import Ocr
from tools.score.scores import scores

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.encoder import Encoder

_BATCHES_AHEAD = 2  # decoded and waiting; memory is that of their pixels
# A model's preprocessing scales the shorter side to its own: of 1 x 65,500 that would take 10 GB.
MAX_ASPECT = 100


@dataclass(frozen=True, kw_only=True)
class ScorerSpec:
    """All that an actor builds a scorer from; travels to it."""

    sections: tuple[str, ...]  # JSON of each score's section
    checkpoint: str | None = None
    digest: str | None = None  # of its weights, as the driver saw them
    weights: Any = "raw"
    device: str = "auto"
    precision: str = "fp32"
    batch_size: int = 256
    num_threads: int = 1  # to decode, and of the model where it runs on the CPU


@dataclass(frozen=True)
class _Prepared:
    """A sample as the model takes it; `error` where its image cannot be used, `text_error` where
    the text in it cannot be read: then the scores that need it have no value, and others have.
    """

    caption: str = ""
    values: dict[str, float] | None = None
    pixels: Tensor | None = None
    masked_pixels: Tensor | None = None
    error: str | None = None
    text_error: str | None = None


class BatchScorer:
    """Judges the samples of one shard after another (curation.scoring.Scorer)."""

    def __init__(
        self, built: Sequence[Score], encoder: Encoder | None, *, batch_size: int, num_threads: int
    ) -> None:
        self._scores = tuple(built)
        self._encoder = encoder
        self._batch_size = batch_size
        self._num_threads = num_threads
        self._ocr = Ocr()

    def score(
        self, samples: Iterable[RawSample], num_samples: int, names: frozenset[str]
    ) -> Scores:
        """Return the outputs `names` of the samples of a shard."""
        active = [score for score in self._scores if score.names & names]
        found = Scores(
            columns={
                name: np.full(num_samples, np.nan, np.float32)
                for score in active
                for name in score.columns.values()
            }
        )
        at = 0
        for batch in self._prepared(samples, active):
            for i, prepared in enumerate(batch):
                why = prepared.error or prepared.text_error
                if why is not None:
                    found.bad[at + i] = why
            rows = np.array([at + i for i, one in enumerate(batch) if one.error is None], np.int64)
            good = [one for one in batch if one.error is None]
            if good:
                self._score_batch(active, good, rows, found, num_samples)
            at += len(batch)
        if at != num_samples:
            raise DataError(f"{at} samples came of {num_samples}: the shard changed. Run it again.")
        for score in active:  # of a shard without a usable image
            for name in score.vectors.values():
                found.vectors.setdefault(name, np.full((at, self._width()), np.nan, np.float16))
        return found

    def _width(self) -> int:
        assert self._encoder is not None
        return int(self._encoder.encode_texts([""]).shape[1])

    def _score_batch(
        self,
        active: Sequence[Score],
        good: Sequence[_Prepared],
        rows: Any,
        found: Scores,
        num_samples: int,
    ) -> None:
        batch = Batch(
            self._encoder,
            [one.caption for one in good],
            [one.pixels for one in good],
            [one.masked_pixels for one in good],
        )
        for row, one in zip(rows, good, strict=True):
            for name, value in (one.values or {}).items():
                found.columns[name][row] = value
        is_unread = np.array([one.text_error is not None for one in good])
        for score in active:
            for name, values in score.score(batch).items():
                if name in found.columns:
                    lacks = is_unread & score.uses_masked
                    found.columns[name][rows] = np.where(lacks, np.nan, values)
                    continue
                if name not in found.vectors:
                    shape = (num_samples, values.shape[1])
                    found.vectors[name] = np.full(shape, np.nan, np.float16)
                found.vectors[name][rows] = values.astype(np.float16)

    def _prepared(
        self, samples: Iterable[RawSample], active: Sequence[Score]
    ) -> Iterator[list[_Prepared]]:
        """Yield prepared batches in order; later ones are read and decoded meanwhile."""
        ready: queue.Queue[list[Future[_Prepared]] | BaseException | None]
        ready = queue.Queue(maxsize=_BATCHES_AHEAD)
        stopped = threading.Event()

        def read(pool: ThreadPoolExecutor) -> None:
            try:
                iterator = iter(samples)
                while batch := list(itertools.islice(iterator, self._batch_size)):
                    if stopped.is_set():
                        return
                    ready.put([pool.submit(self._prepare, sample, active) for sample in batch])
                ready.put(None)
            except BaseException as error:  # raised again where the batches are taken
                ready.put(error)

        with ThreadPoolExecutor(self._num_threads) as pool:
            reader = threading.Thread(target=read, args=(pool,), daemon=True)
            reader.start()
            try:
                while (batch := ready.get()) is not None:
                    if isinstance(batch, BaseException):
                        raise batch
                    yield [future.result() for future in batch]
            finally:
                stopped.set()
                while reader.is_alive():  # it may wait for room
                    _drain(ready)
                    reader.join(timeout=0.05)
                _drain(ready)

    def _prepare(self, sample: RawSample, active: Sequence[Score]) -> _Prepared:
        if len(sample.image) > MAX_IMAGE_BYTES:
            return _Prepared(error=f"more than {MAX_IMAGE_BYTES:,} bytes")
        try:
            image = decode_image(sample.image)
        except UndecodableImageError as error:
            return _Prepared(error=str(error))
        if max(image.size) > MAX_ASPECT * min(image.size):
            size = f"{image.width:,} x {image.height:,} pixels"
            return _Prepared(error=f"{size}: more than {MAX_ASPECT} times as long as wide")
        picture = Picture(image, sample.caption, self._ocr)
        values: dict[str, float] = {}
        pixels = masked = text_free = text_error = None
        for score in active:
            try:
                values |= score.look(picture)
                text_free = picture.masked if score.uses_masked else text_free
            except UndecodableImageError as error:  # of the reader of text
                text_error = str(error)
        if any(score.uses_model for score in active):
            pixels = self._transformed(image)
        if text_free is not None:
            masked = self._transformed(text_free)
        return _Prepared(sample.caption, values, pixels, masked, text_error=text_error)

    def _transformed(self, image: Image.Image) -> Tensor:
        assert self._encoder is not None
        return self._encoder.transform(image)


def _drain(ready: queue.Queue[Any]) -> None:
    while not ready.empty():
        batch = ready.get()
        for future in batch if isinstance(batch, list) else ():
            future.cancel()


def build_scorer(spec: ScorerSpec) -> BatchScorer:
    """Build the scorer of an actor: the scores, and the model where one of them needs it."""
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # decode_image says it better
    sections = [json.loads(text) for text in spec.sections]
    built = [scores.section(s["name"]).model_validate(s).build() for s in sections]
    encoder = None
    if spec.checkpoint is not None and any(score.uses_model for score in built):
        os.environ.setdefault("OMP_NUM_THREADS", str(spec.num_threads))
        from evaluation.encoder import load_encoder

        import torch  # isort: skip

        encoder = load_encoder(
            spec.checkpoint,
            device=spec.device,
            precision=spec.precision,
            weights=spec.weights,
        )
        if spec.digest not in (None, encoder.digest):
            raise CheckpointError(
                f"{spec.checkpoint}: the weights on this node have sha256 {encoder.digest}, the "
                f"driver saw {spec.digest}. Put the same checkpoint on every node, and run the "
                "same line again."
            )
        if encoder.device.type == "cpu":
            torch.set_num_threads(spec.num_threads)
    return BatchScorer(
        built, encoder, batch_size=spec.batch_size, num_threads=max(1, spec.num_threads)
    )
