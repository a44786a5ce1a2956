"""One local batch: what it holds, how it is cut out of the order of data, how its rows are made.

Everything in it is a function of (seed, data, position).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pretrain.data import captions
from pretrain.data.augment import Box, ImageTransform
from pretrain.data.captions import CaptionChoice, texts_at
from pretrain.data.decode import UndecodableImageError, open_image
from pretrain.data.order import positions_of
from pretrain.data.reader import RawSample, UnusableSampleError
from pretrain.model.tokenizer import Tokenizer
from pretrain.reduction.image import ImageReduction
from pretrain.reduction.text import TextReduction


class BadSample(NamedTuple):
    """A sample that could not be used at this position; `kind` is one of few, `problem` says more.

    `source` is the name of its manifest.
    """

    position: int
    source: str
    key: str
    kind: str
    problem: str


class Batch(NamedTuple):
    """The local part of one global batch: uint8 pixels, token ids, kept patches and positions.

    `view_bv3HW`: further augmented views of each image; `negative_token_bL`, `negative_image_b3HW`:
    the sample's hard negatives; `view_corner_bv4`: where the views lie in an image that encloses
    them (model/attentive.py). Each is there where the dataset was built with it.
    """

    image_b3HW: Tensor
    token_bL: Tensor
    kept_bK: Tensor | None
    key: list[str]
    bad: list[BadSample]
    view_bv3HW: Tensor | None = None
    negative_token_bL: Tensor | None = None
    negative_image_b3HW: Tensor | None = None
    kept_text_bK: Tensor | None = None
    view_corner_bv4: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How the samples consumed are cut into batches for one rank."""

    seed: int
    global_batch_size: int
    rank: int
    world_size: int
    window_shards: int
    patch_rows: int  # patches along one side of an image
    image_reduction: ImageReduction
    text_reduction: TextReduction
    skipped: tuple[tuple[int, int], ...] = ()  # ranges of positions, see order.positions_of

    def positions(self, consumed: int) -> npt.NDArray[np.int64]:
        """Return the positions of this rank's part of the global batch after `consumed` samples."""
        local = self.global_batch_size // self.world_size
        start = consumed + self.rank * local
        return positions_of(np.arange(start, start + local, dtype=np.int64), self.skipped)


@dataclass(frozen=True, kw_only=True)
class SampleForm:
    """What is made of a sample."""

    image: ImageTransform
    caption: CaptionChoice = field(default_factory=CaptionChoice)
    views: tuple[ImageTransform, ...] = ()  # further augmented views
    negative_caption: str | None = None  # the place of a hard negative (captions.py)
    negative_image: str | None = None  # the extension of one

    @property
    def extensions(self) -> tuple[str, ...]:
        """The members to read beside the image."""
        wanted = self.caption.extensions
        if self.negative_caption:
            wanted += CaptionChoice(places=((self.negative_caption, 1.0),)).extensions
        return wanted + ((self.negative_image,) if self.negative_image else ())


class BatchMaker:
    """Makes the rows of one batch in place, with everything that is drawn by position."""

    def __init__(
        self,
        form: SampleForm,
        caption: CaptionChoice,
        seed: int,
        positions: npt.NDArray[np.int64],
    ) -> None:
        self._form, self._caption, self._positions = form, caption, positions
        size, side = len(positions), form.image.image_size
        self._image = torch.empty((size, 3, side, side), dtype=torch.uint8)
        self._views = torch.empty((size, len(form.views), 3, side, side), dtype=torch.uint8)
        self._negative = torch.empty_like(self._image) if form.negative_image else None
        self._keys, self._captions, self._negative_captions = ([""] * size for _ in range(3))
        encloses = form.image.crop == "enclosing"
        self._corners = torch.empty((size, len(form.views), 4)) if encloses else None
        transforms = (form.image, *form.views)
        self._image_draws = [t.draw(seed, positions, view) for view, t in enumerate(transforms)]
        self._caption_draws = captions.draw(seed, positions)

    def put(self, i: int, sample: RawSample) -> None:
        """Make row i of a sample. Raises UnusableSampleError."""
        form = self._form
        caption = self._caption(sample.captions, sample.member.get, self._caption_draws[i])
        if caption is None:
            raise UnusableSampleError(sample.key, "no caption", "no caption")
        if form.negative_caption:
            self._negative_captions[i] = _negative(sample, form.negative_caption)
        try:
            outer = None if self._corners is None else self._place_views(i, sample.image)
            form.image(sample.image, self._image_draws[0][i], self._image[i], crop=outer)
            for view, transform in enumerate(form.views):
                drawn = self._image_draws[view + 1][i]
                transform(sample.image, drawn, self._views[i, view])
            if self._negative is not None and form.negative_image is not None:
                negative = sample.member.get(form.negative_image, b"")
                form.image(negative, self._image_draws[0][i], self._negative[i])
        except UndecodableImageError as error:
            raise UnusableSampleError(sample.key, error.kind, str(error)) from None
        self._captions[i], self._keys[i] = caption, sample.key

    def _place_views(self, i: int, data: bytes) -> tuple[Box, int]:
        """Return the box around the views of row i, and its scale; note where they lie in it."""
        assert self._corners is not None
        form = self._form
        image = open_image(data, max_image_pixels=form.image.max_image_pixels)
        drawn = [draws_[i] for draws_ in self._image_draws[1:]]
        boxes = [
            t.box(image.width, image.height, d) for t, d in zip(form.views, drawn, strict=True)
        ]
        own = self._image_draws[0][i]
        outer, scale = form.image.around(boxes, image.width, image.height, own)
        for view, box in enumerate(boxes):
            left, right = (box.left - outer.left + w for w in (0, box.width))
            if form.views[view].mirrors(drawn[view]):
                left, right = right, left
            top = box.top - outer.top
            corners = torch.tensor([left, top, right, top + box.height], dtype=torch.float32)
            size = torch.tensor([outer.width, outer.height] * 2, dtype=torch.float32)
            self._corners[i, view] = corners / size
        return outer, scale

    def batch(self, tokenizer: Tokenizer, plan: BatchPlan, bad: list[BadSample]) -> Batch:
        """Return the batch: captions as ids, kept patches drawn."""
        form, kept, side, reduction = self._form, None, plan.patch_rows, plan.image_reduction
        if not reduction.in_model and reduction.num_kept(side) < side * side:
            kept = torch.from_numpy(reduction.kept(plan.seed, self._positions, side))
        negative = tokenizer(self._negative_captions) if form.negative_caption else None
        views = self._views if form.views else None
        token, kept_text = tokenizer.reduced(
            self._captions, plan.text_reduction, seed=plan.seed, positions=self._positions
        )
        return Batch(
            *(self._image, token, kept, self._keys, bad, views, negative, self._negative),
            kept_text,
            self._corners,
        )


def _negative(sample: RawSample, place: str) -> str:
    found = texts_at(place, sample.member.get, {})
    if not found:
        raise UnusableSampleError(sample.key, "no negative caption", f"nothing at {place}")
    return found[0]
