"""One pass over a dataset's images and texts. Every method runs on what comes out of here.

Features are float32, on the CPU, and not normalized (some methods need the length); a method
embeds them through the model's similarity. They come from the cache where they are in it.

Legend: n images, m texts, D embedding width, b a batch.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from configs.errors import DataError, PairmillError
from configs.progress import progress
from evaluation.cache import Entry, FeatureCache, key_of
from evaluation.dataset import ImageSample, Part
from evaluation.identity import Identity, Weights
from evaluation.images import UndecodableImageError, read_image
from evaluation.world import World

if TYPE_CHECKING:
    from evaluation.encoder import Encoder

NUM_NAMED = 5  # undecodable images that a message names


@dataclass(frozen=True)
class EncodeOptions:
    """How to run over the images."""

    batch_size: int = 256
    num_workers: int = 0
    max_undecodable: int = 0


class ImageTower(Protocol):
    """Whatever turns pictures into features: a checkpoint's image tower, an auxiliary encoder."""

    @property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """The preprocessing."""
        ...

    def encode_images(self, pixels_b3HW: Tensor) -> Tensor:
        """Return features [b, D], float32 on the CPU."""
        ...


# Preprocessed pixels, why an image cannot be decoded, or what ends the run.
_Item = Tensor | str | PairmillError | OSError


class _Batch:
    """Preprocessed pixels of the images that could be decoded, and the reasons of the others.

    Errors are values here: one raised in a worker process would arrive with its traceback as text.
    """

    def __init__(self, items: Sequence[tuple[int, _Item]]) -> None:
        self.pixels = [item for _, item in items if isinstance(item, Tensor)]
        self.undecodable = {position: item for position, item in items if isinstance(item, str)}
        self.errors = [item for _, item in items if isinstance(item, PairmillError | OSError)]
        self.num_samples = len(items)


class _Pictures(torch.utils.data.Dataset[tuple[int, _Item]]):
    def __init__(
        self, samples: Sequence[ImageSample], transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> tuple[int, _Item]:
        try:
            return position, self.transform(read_image(self.samples[position].image))
        except UndecodableImageError as error:
            return position, str(error)
        except (PairmillError, OSError) as error:
            return position, error


def keep_decodable(name: str, part: Part, undecodable: dict[int, str], limit: int) -> Part:
    """Return the split without its undecodable images, if they are at most `limit`.

    They are counted and named on stderr. Raises DataError where they are more, or nothing is left.
    """
    if not undecodable:
        return part
    named = [
        f"{part.samples[position].key} in {part.samples[position].image.tar.name} ({reason})"
        for position, reason in sorted(undecodable.items())[:NUM_NAMED]
    ]
    more = len(undecodable) - len(named)
    text = (
        f"{name}: {len(undecodable)} of {len(part.samples):,} images cannot be decoded: "
        f"{', '.join(named)}{f' and {more} more' if more else ''}"
    )
    if len(undecodable) > limit or len(undecodable) == len(part.samples):
        raise DataError(
            f"{text}. Expected at most max_undecodable={limit}. Mend the dataset; or raise "
            "max_undecodable, and the result will stand on fewer images (n in its row)."
        )
    print(f"warning: {text}; left out", file=sys.stderr)
    return part.without(list(undecodable))


class Features:
    """The features of one checkpoint, computed when they are asked for, each of them once."""

    def __init__(
        self,
        identity: Identity,
        cache: FeatureCache,
        options: EncodeOptions,
        *,
        device: str = "auto",
        precision: str = "fp32",
        weights: Weights = "raw",
        world: World | None = None,
    ) -> None:
        self.identity = identity
        self.cache = cache
        self.options = options
        self.device = device
        self.precision = precision
        self.weights = weights
        self.world = world or World()
        self.seconds_encoding = 0.0  # since the start of the run; none where all was in the cache

    @cached_property
    def encoder(self) -> Encoder:
        """The loaded model. Not loaded where everything is in the cache."""
        from evaluation.encoder import load_encoder  # with open_clip, whose import takes seconds

        return load_encoder(
            self.identity.checkpoint,
            device=self.device,
            precision=self.precision,
            weights=self.weights,
        )

    def _model(self) -> dict[str, Any]:
        return {
            "weights": self.identity.digest,
            "setting": self.identity.setting_digest,
            "precision": self.precision,
        }

    def logit_scale(self) -> float:
        """Return exp(s) of the model, from the cache where it is in it."""
        key = key_of({**self._model(), "kind": "logit_scale"})
        entry = self.cache.get(key)
        if entry is None:
            scale = torch.tensor([[self.encoder.logit_scale]])
            self._publish(key, scale, {"kind": "scale", "what": "the logit scale"})
            return float(scale)
        return float(entry.feature_nD)

    def _publish(self, key: str, feature_nD: Tensor, meta: dict[str, Any]) -> None:
        if self.world.rank == 0:
            self.cache.put(key, feature_nD, {"checkpoint": self.identity.checkpoint, **meta})

    def images(self, name: str, split: str, part: Part) -> tuple[Tensor, Part]:
        """Return image features [n, D] and the split that they belong to.

        The split is the one given, less the images that cannot be decoded (see keep_decodable).
        """
        key = key_of({**self._model(), "kind": "images", **self._data(part)})
        what = f"{name} ({split})"
        entry = self.cache.get(key)
        if entry is None:
            entry = self._encoded(key, what, part, lambda: self.encoder)
            self.logit_scale()  # cached while the model is there
        return self._checked(entry, name, part)

    def images_together(self, name: str, split: str, part: Part) -> None:
        """Encode a split with all ranks, where it is not in the cache of one of them."""
        key = key_of({**self._model(), "kind": "images", **self._data(part)})
        if self.world.any(self.cache.get(key) is None):
            self._encoded(key, f"{name} ({split})", part, lambda: self.encoder)
            self.logit_scale()  # cached while the model is there

    def auxiliary(
        self, identity: str, tower: Callable[[], ImageTower], name: str, split: str, part: Part
    ) -> Tensor:
        """Return another encoder's features of a split; `identity` names its weights."""
        key = key_of({"auxiliary": identity, "precision": "fp32", **self._data(part)})
        entry = self.cache.get(key)
        if entry is None:
            entry = self._encoded(key, f"{name} ({split}) by {identity}", part, tower)
        return self._checked(entry, name, part)[0]

    def _data(self, part: Part) -> dict[str, Any]:
        return {"data": part.images_digest, "batch_size": self.options.batch_size}

    def _checked(self, entry: Entry, name: str, part: Part) -> tuple[Tensor, Part]:
        undecodable = {int(k): str(v) for k, v in entry.meta.get("undecodable", {}).items()}
        kept = keep_decodable(name, part, undecodable, self.options.max_undecodable)
        return entry.feature_nD, kept

    def _encoded(self, key: str, what: str, part: Part, tower: Callable[[], ImageTower]) -> Entry:
        started = time.monotonic()
        size = self.options.batch_size
        num_parts = -(-len(part.samples) // size)
        error = None
        try:
            own = [
                number
                for number in self.cache.missing_parts(key, num_parts)
                if number % self.world.size == self.world.rank
            ]
            self._encode_parts(key, what, part, own, tower)
        except (PairmillError, OSError) as caught:
            error = caught
        self.world.together(error)
        joined: tuple[Tensor, dict[int, str]] | None = None
        with suppress(FileNotFoundError):
            joined = self.cache.join_parts(key, num_parts)
        if self.world.any(joined is None):  # all ranks go the same way
            return self._of_another_run(key, what)
        assert joined is not None
        feature_nD, undecodable = joined
        meta: dict[str, Any] = {"kind": "images", "what": what, "data": part.data_digest}
        meta["undecodable"] = {str(k): v for k, v in undecodable.items()}
        self.world.together()  # before rank 0 removes the parts
        self._publish(key, feature_nD, meta)
        self.world.together()
        self.seconds_encoding += time.monotonic() - started
        return Entry(feature_nD, meta)

    def _of_another_run(self, key: str, what: str) -> Entry:
        """Return what another run has published meanwhile; it removed the parts that are missing.

        Raises DataError where there is nothing.
        """
        entry = self.cache.get(key)
        if entry is None:
            raise DataError(
                f"{what}: batches in the cache {self.cache.folder} were removed while they were "
                "computed, and no run has finished them. Run the same line again, and leave the "
                "cache alone meanwhile."
            )
        if self.world.rank == 0:
            self.cache.remove_parts(key)
        return entry

    def _encode_parts(
        self,
        key: str,
        what: str,
        part: Part,
        numbers: Sequence[int],
        tower: Callable[[], ImageTower],
    ) -> None:
        if not numbers:
            return
        size, total = self.options.batch_size, len(part.samples)
        batches = [list(range(n * size, min((n + 1) * size, total))) for n in numbers]
        encoder = tower()
        loader = DataLoader(
            _Pictures(part.samples, encoder.transform),
            batch_sampler=batches,
            num_workers=min(self.options.num_workers, len(batches)),
            collate_fn=_Batch,
        )
        with progress(f"encode {what}", total=sum(map(len, batches)), unit="images") as bar:
            for number, batch in zip(numbers, loader, strict=True):
                if batch.errors:
                    raise batch.errors[0]
                found = torch.empty(0, 0)
                if batch.pixels:
                    found = encoder.encode_images(torch.stack(batch.pixels))
                self.cache.put_part(key, number, found, batch.undecodable)
                bar.advance(batch.num_samples, samples=batch.num_samples)

    def texts(self, texts: Sequence[str], what: str) -> Tensor:
        """Return raw text features [m, D].

        Each distinct text is encoded once, so that equal texts have equal features and tie exactly.
        """
        unique = sorted(set(texts))
        digest = hashlib.sha256(json.dumps(unique, ensure_ascii=False).encode()).hexdigest()
        size = self.options.batch_size
        content = {"kind": "texts", "texts": digest, "batch_size": size}
        key = key_of({**self._model(), **content})
        entry = self.cache.get(key)
        if entry is None:
            entry = self._encoded_texts(key, unique, what)
        position = {text: i for i, text in enumerate(unique)}
        index = torch.from_numpy(np.asarray([position[text] for text in texts], dtype=np.int64))
        return entry.feature_nD[index]

    def _encoded_texts(self, key: str, unique: Sequence[str], what: str) -> Entry:
        started = time.monotonic()
        size = self.options.batch_size
        token_mL = torch.cat(
            [self.encoder.tokens(unique[i : i + size]) for i in range(0, len(unique), size)]
        )
        # Texts that the model cannot tell apart are encoded once too, and tie exactly.
        distinct_uL, inverse_m = torch.unique(token_mL, dim=0, return_inverse=True)
        # Short texts stand together: a batch is as long as its longest.
        order_u = torch.argsort(self.encoder.text_lengths(distinct_uL), stable=True)
        found = []
        with progress(f"encode texts of {what}", total=len(distinct_uL), unit="texts") as bar:
            for batch in torch.split(distinct_uL[order_u], size):
                found.append(self.encoder.encode_tokens(batch))
                bar.advance(len(batch))
        feature_mD = torch.cat(found)[torch.argsort(order_u)[inverse_m]]
        meta = {"kind": "texts", "what": what}
        self._publish(key, feature_mD, meta)
        self.seconds_encoding += time.monotonic() - started
        return Entry(feature_mD, meta)
