"""Files of vectors that a rule is given: `.npy`, [n, dim] of any floating type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from configs.errors import DataError, UsageError
from curation.selectors.cosines import unit
from curation.vectors import has_vector

_PIECE_BYTES = 4 << 20


def file_digest(path: Path | None) -> str:
    """Return the xxh3-128 of a file; of no file the empty string.

    Raises:
        UsageError: it is not there.
    """
    if path is None:
        return ""
    hasher = xxhash.xxh3_128()
    try:
        with open(path, "rb") as file:
            while piece := file.read(_PIECE_BYTES):
                hasher.update(piece)
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); expected an .npy of vectors, [n, dim]."
        ) from None
    return hasher.hexdigest()


def read_file(path: Path, dim: int | None) -> npt.NDArray[Any]:
    """Return the vectors of a file: [n, dim], memory-mapped.

    Raises:
        DataError: it is no .npy of floating numbers [n, dim], or holds no vector.
    """
    expected = f"expected an .npy of floating numbers, [n, {dim or 'dim'}]"
    try:
        vectors: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); {expected}.") from None
    if vectors.ndim != 2 or vectors.dtype.kind != "f" or not len(vectors):
        raise DataError(f"{path}: got {vectors.dtype} {list(vectors.shape)}; {expected}.")
    if dim is not None and vectors.shape[1] != dim:
        raise DataError(
            f"{path}: got {vectors.shape[1]} dimensions; the vectors of the samples have {dim}. "
            "Both must come of the same model."
        )
    return vectors


def read_centroids(
    path: Path, dim: int | None, *, rows: slice = slice(None)
) -> npt.NDArray[np.float16]:
    """Return (some of) the vectors of a file as unit rows, rounded to float16; in their order.

    Raises:
        DataError: as `read_file`; or a row is zero or not finite.
    """
    vectors = np.asarray(read_file(path, dim)[rows], np.float32)
    bad = ~has_vector(vectors)
    if bad.any():
        raise DataError(
            f"{path}: row {(rows.start or 0) + int(bad.argmax())} is zero or not finite, which is "
            "no direction. Leave it out."
        )
    rounded: npt.NDArray[np.float16] = unit(vectors).astype(np.float16)
    return rounded
