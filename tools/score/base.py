"""The contract of a score, and the registry of them all.

    look    (a picture at a time, in threads, while the model runs)   numbers of the picture itself
    score   (a batch at a time)                                       numbers from features

Image and text features are computed once a batch, whatever number of scores asks for them.

Legend: b samples of a batch, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from configs.registry import Registry

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from evaluation.encoder import Encoder
    from pretrain.model.similarity import Similarity
    from tools.score.ocr import Ocr, Region

# Of a column: no dot, which would be the value of a rule or a field of the .json.
Column = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
VectorsName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
FloatArray = npt.NDArray[np.float32]


class Picture:
    """One decoded picture (RGB) with its caption; the text in it is read when asked for, once."""

    def __init__(self, image: Image.Image, caption: str, ocr: Ocr | None) -> None:
        self.image = image
        self.caption = caption
        self._ocr = ocr

    @cached_property
    def regions(self) -> list[Region]:
        """The text found in the picture."""
        assert self._ocr is not None, "a score that reads text must say so: uses_ocr"
        return self._ocr.regions(self.image)

    @cached_property
    def masked(self) -> Image.Image | None:
        """The picture with its text painted over (T-MARS); None where it has no text."""
        from tools.score.ocr import paint_over

        return paint_over(self.image, self.regions) if self.regions else None


class Batch:
    """Samples of a batch whose images could be decoded, encoded when asked for, once.

    `pixels` are the model's inputs; of `masked_pixels` those of pictures that have text, else None.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        captions: Sequence[str],
        pixels: Sequence[Tensor | None],
        masked_pixels: Sequence[Tensor | None],
    ) -> None:
        self.captions = tuple(captions)
        self._encoder = encoder
        self._pixels = pixels
        self._masked_pixels = masked_pixels
        self._texts: dict[tuple[str, ...], Tensor] = {}

    @property
    def encoder(self) -> Encoder:
        """The model."""
        assert self._encoder is not None, "a score that encodes must say so: uses_model"
        return self._encoder

    @property
    def similarity(self) -> Similarity:
        """The model's geometry."""
        return self.encoder.similarity

    @cached_property
    def images(self) -> Tensor:
        """The embedded images [b, D]."""
        return self.similarity.embed_image(self._encode(self._pixels))

    @cached_property
    def masked_images(self) -> Tensor:
        """The embedded images [b, D] with their text painted over."""
        at = [i for i, pixels in enumerate(self._masked_pixels) if pixels is not None]
        if not at:
            return self.images
        masked_bD = self.images.clone()
        raw = self._encode([self._masked_pixels[i] for i in at])
        masked_bD[at] = self.similarity.embed_image(raw)
        return masked_bD

    def texts(self, texts: Sequence[str] | None = None) -> Tensor:
        """Return the embedded texts [b, D]; the captions where none are given."""
        texts = self.captions if texts is None else tuple(texts)
        if texts not in self._texts:
            raw = self.encoder.encode_texts(texts)
            self._texts[texts] = self.similarity.embed_text(raw)
        return self._texts[texts]

    def paired(self, image_bD: Tensor, text_bD: Tensor) -> FloatArray:
        """Return the similarity [b] of each image with its own text."""
        score_bb = self.similarity.scores(image_bD, text_bD)
        scores: FloatArray = score_bb.diagonal().float().numpy()
        return scores

    def _encode(self, pixels: Sequence[Tensor | None]) -> Tensor:
        import torch

        there = [one for one in pixels if one is not None]
        assert len(there) == len(pixels), "pixels that nobody prepared"
        return self.encoder.encode_images(torch.stack(there))


class Score:
    """One score: what it makes, what it needs, and the two steps of which it has one."""

    version = 1  # of the definition; raised where values change, so that old ones are made anew
    uses_model = False
    uses_masked = False  # the model sees pictures without their text
    uses_ocr = False  # `look` asks for the text in a picture

    def __init__(
        self, *, columns: Mapping[str, str | None], vectors: Mapping[str, str | None] | None = None
    ) -> None:
        # By the keyword of the factory that names them; None: not wanted.
        self.columns = {key: name for key, name in columns.items() if name}
        self.vectors = {key: name for key, name in (vectors or {}).items() if name}

    @property
    def names(self) -> frozenset[str]:
        """What it makes."""
        return frozenset({*self.columns.values(), *self.vectors.values()})

    def digest(self) -> str:
        """Return the digest of the files that it judges by."""
        return ""

    def look(self, picture: Picture) -> Mapping[str, float]:
        """Return numbers of one picture by name of the column. Runs in several threads."""
        return {}

    def score(self, batch: Batch) -> Mapping[str, Any]:
        """Return numbers [b] by name of the column, and vectors [b, D] by their name."""
        return {}


scores: Registry[Score] = Registry("score")
Factory = Callable[..., Score]
