"""Text token reduction: how the ids of a caption come to fit the context length, in one place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def truncate(
    ids: Sequence[Sequence[int]], context_length: int, *, pad_id: int, tail: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Return [n, context_length] int64: each text cut at its end, padded with `pad_id`.

    `tail` are the special tokens that end every text of `ids`; a text that is cut keeps them.
    """
    out = np.full((len(ids), context_length), pad_id, dtype=np.int64)
    for row, text in zip(out, ids, strict=True):
        length = len(text)
        if length <= context_length:
            row[:length] = text
        else:
            row[:] = text[:context_length]
            if tail:
                row[-len(tail) :] = tail
    return out
