"""Which of two prompts does a picture fit: a score from words, or from tuned vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from configs.errors import ConfigError, DataError
from tools.score.base import Batch, Column, Score, scores

if TYPE_CHECKING:
    from torch import Tensor

    from evaluation.encoder import Encoder

Prompts = Annotated[tuple[str, ...], Field(min_length=1)]
_SAFE = (".npy", ".safetensors")


def read_pair(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return the two vectors [2, D] of a `.npy` or `.safetensors`; pickles are never opened.

    Raises:
        ConfigError: another kind of file.  DataError: it is damaged, or holds no two vectors.
    """
    if path.suffix not in _SAFE:
        raise ConfigError(
            f"prompt_pair: vectors: got {path.name!r}; expected a .npy or .safetensors. A pickle "
            "(.p, .pkl, .pt) can run anything when it is opened: load it where you trust it, and "
            "save the array with numpy.save."
        )
    if not path.is_file():
        raise ConfigError(
            f"prompt_pair: vectors: there is no file {str(path)!r}; expected a .npy or "
            ".safetensors of two vectors, [2, D]."
        )
    try:
        if path.suffix == ".npy":
            found = [np.load(path, allow_pickle=False)]
        else:
            from safetensors.numpy import load_file

            found = list(load_file(path).values())
    except Exception as error:  # numpy and safetensors raise their own
        raise DataError(f"{path} cannot be read as vectors: {error}") from None
    shapes = [list(array.shape) for array in found]
    if len(found) != 1 or found[0].ndim != 2 or found[0].shape[0] != 2:
        raise DataError(f"{path}: got arrays of shape {shapes}; expected one of [2, D].")
    pair = np.asarray(found[0], np.float32)
    if not np.isfinite(pair).all() or not pair.any(axis=1).all():
        raise DataError(f"{path}: a vector is zero or not finite, which is no direction.")
    return pair


class _PromptPair(Score):
    uses_model = True

    def __init__(
        self,
        column: str,
        prompts: tuple[Prompts, Prompts] | None,
        vectors: Path | None,
        logit_scale: float | Literal["model"],
    ) -> None:
        super().__init__(columns={"column": column})
        self._prompts, self._path, self._scale = prompts, vectors, logit_scale
        self._pair = None if vectors is None else read_pair(vectors)
        self._class_2D: Tensor | None = None

    def digest(self) -> str:
        return "" if self._path is None else hashlib.sha256(self._path.read_bytes()).hexdigest()

    def score(self, batch: Batch) -> Mapping[str, Any]:
        import torch

        if self._class_2D is None:
            self._class_2D = self._classes(batch.encoder)
        scale = batch.encoder.logit_scale if self._scale == "model" else self._scale
        logit_b2 = scale * batch.similarity.scores(batch.images, self._class_2D)
        return {self.columns["column"]: torch.softmax(logit_b2, dim=1)[:, 0].numpy()}

    def _classes(self, encoder: Encoder) -> Tensor:
        import torch

        if self._pair is None:
            assert self._prompts is not None
            raw = [encoder.encode_texts(side) for side in self._prompts]
            own = [encoder.similarity.class_vectors(one[None]) for one in raw]
            return torch.cat(own)
        width = encoder.encode_texts([""]).shape[1]
        if self._pair.shape[1] != width:
            raise DataError(
                f"{self._path}: got vectors of width {self._pair.shape[1]}; this model's have "
                f"{width}. Vectors belong to the model that they were tuned for."
            )
        return encoder.similarity.embed_text(torch.from_numpy(self._pair))


@scores.register("prompt_pair")
def prompt_pair(
    *,
    column: Column,
    prompts: tuple[Prompts, Prompts] | None = None,
    vectors: Path | None = None,
    logit_scale: Annotated[float, Field(gt=0)] | Literal["model"] = "model",
) -> Score:
    """Probability that a picture fits the first of two prompts rather than the second.

    softmax(logit_scale * similarity) over the pair, the first of it. `prompts` are two lists of
    texts; several of one side are averaged as prompts of a class are. `vectors` in their place is a
    .npy or .safetensors [2, D] of text features that were tuned. Q16 documents inappropriate
    content so (Schramowski et al., arXiv:2202.06675): "This image is about something negative" and
    "... positive", tuned, with logit_scale 100. What the score says depends on the prompts and the
    model: look at the pictures at both ends (`pairmill report`) before a threshold.
    """
    if (prompts is None) == (vectors is None):
        raise ConfigError(
            "prompt_pair: give either `prompts`, two lists of texts, or `vectors`, a file of two."
        )
    return _PromptPair(column, prompts, vectors, logit_scale)
