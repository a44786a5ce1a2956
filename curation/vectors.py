"""Vectors of the samples of a shard: one `.npy` file beside its index (docs/formats.md, "Vectors").

    00000.tar   00000.index.parquet   00000.index.clip_image.npy

float16, [rows of the index, dim]; row i belongs to row i of the index. A row of NaN says that the
sample has no vector (its image could not be used). Behind the vectors, in the same file, stands a
second array: a JSON with their digest and that of the index that they were made for, so that a
reader knows them without reading them, and never takes those of another state of the tar.
`pairmill score` writes them; the selectors (curation/selectors) read them.
"""

from __future__ import annotations

import glob
import json
import re
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from numpy.lib import format as npy

from configs.errors import DataError, UsageError, did_you_mean
from configs.publish import published_file
from curation.index import read_index_info

VERSION = 1
DTYPE = np.dtype("<f2")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_SUFFIX = ".parquet"

Vectors = npt.NDArray[np.float16]


@dataclass(frozen=True, kw_only=True)
class VectorsInfo:
    """What a file of vectors says of itself."""

    num_samples: int  # rows
    dim: int
    digest: str  # xxh3-128 of the vectors
    index: str  # the index that they belong to: IndexInfo.content
    made_by: str = ""  # what made them (a digest of weights and preprocessing), as the writer says
    version: int = VERSION


def vectors_path(index_path: Path, name: str) -> Path:
    """Return where the vectors called `name` of an index lie.

    Raises:
        UsageError: no vectors can be called that.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"no vectors can be called {name!r}: expected letters, digits, '_' and '-', the first "
            "a letter or digit, since the name becomes a part of a file's name."
        )
    return index_path.with_name(f"{index_path.name.removesuffix(_SUFFIX)}.{name}.npy")


def vectors_of(index_path: Path) -> list[str]:
    """Return the names of the vectors that lie beside an index, for whatever state of it."""
    stem = index_path.name.removesuffix(_SUFFIX)
    found = index_path.parent.glob(f"{glob.escape(stem)}.*.npy")
    return sorted(path.name.removeprefix(f"{stem}.").removesuffix(".npy") for path in found)


def has_vector(vectors: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which rows hold a vector: finite, and not zero, which has no direction."""
    is_there: npt.NDArray[np.bool_] = np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)
    return is_there


def write_vectors(
    index_path: Path, name: str, array: npt.NDArray[Any], *, made_by: str = ""
) -> VectorsInfo:
    """Publish the vectors called `name` of an index: float16 [rows of the index, dim].

    A row is finite, or NaN throughout: no vector. `made_by` says what made them: a writer that
    starts again finds it in `read_vectors_info`.

    Raises:
        DataError: there is no such index, or the array does not fit it.
        UsageError: no vectors can be called that.
    """
    path, info = vectors_path(index_path, name), read_index_info(index_path)
    if info is None:
        raise DataError(
            f"{index_path} is no readable index, and vectors belong to one. Make it with "
            f"`pairmill index {index_path.parent}`, or scan (`stages=[scan]`)."
        )
    expected = f"expected float16 [{info.num_samples}, dim], a row for each of {index_path}"
    if array.dtype != DTYPE or array.ndim != 2 or len(array) != info.num_samples:
        raise DataError(
            f"vectors {name!r}: got {array.dtype} {list(array.shape)}; {expected}. "
            "Give one row a sample, NaN where it has none, as float16."
        )
    if not array.shape[1]:
        raise DataError(f"vectors {name!r}: got a dimension of 0; {expected}.")
    bad = ~(np.isfinite(array).all(axis=1) | np.isnan(array).all(axis=1))
    if bad.any():
        raise DataError(
            f"vectors {name!r}: {bad.sum()} rows are neither finite nor NaN throughout, the first "
            f"is row {int(bad.argmax())} of {index_path}. float16 ends at 65504: normalize them."
        )
    data = np.ascontiguousarray(array)
    made = VectorsInfo(
        num_samples=len(data),
        dim=data.shape[1],
        digest=xxhash.xxh3_128_hexdigest(data.data),
        index=info.content,
        made_by=made_by,
    )
    with published_file(path) as file:
        npy.write_array(file, data, version=(1, 0), allow_pickle=False)
        text = json.dumps(asdict(made), sort_keys=True).encode()
        npy.write_array(file, np.frombuffer(text, np.uint8), version=(1, 0), allow_pickle=False)
    return made


def read_vectors_info(index_path: Path, name: str) -> VectorsInfo | None:
    """Return what the vectors of an index say of themselves; None where it has none to be used.

    That is: no file, not one of `write_vectors`, or one made for another state of the index.
    """
    made: VectorsInfo | None = None
    with suppress(DataError, FileNotFoundError):
        made = _read_info(vectors_path(index_path, name))
    info = read_index_info(index_path)
    return made if made and info and made.index == info.content else None


def read_vectors(index_path: Path, name: str, *, digest: str | None = None) -> Vectors:
    """Return the vectors called `name` of an index: a read-only map of float16 [rows, dim].

    Raises:
        DataError: there are none, they are damaged, or were made for another state of the index;
            or they are not those of that digest.
        UsageError: no vectors can be called that.
    """
    path, info = vectors_path(index_path, name), read_index_info(index_path)
    try:
        made = _read_info(path)
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        there = vectors_of(index_path)
        why = f"there are no such vectors{did_you_mean(name, there).rstrip('?.')}"
        if there:
            why += f" (this index has: {', '.join(there)})"
        raise DataError(_advise(path, why, name)) from None
    if info is None or made.index != info.content or made.num_samples != info.num_samples:
        rows = info.num_samples if info else "no"
        raise DataError(
            _advise(path, f"made for another index ({made.num_samples} rows, now {rows})", name)
        )
    if digest is not None and made.digest != digest:
        raise DataError(
            f"{path} holds other vectors than those that were decided on: they were made again "
            "since. Decide again: leave `stages` out."
        )
    found: Vectors = vectors
    return found


@dataclass(frozen=True)
class FindVectors:
    """Look for the vectors of one shard."""

    index: Path
    names: tuple[str, ...]

    def __str__(self) -> str:
        return str(self.index)


@dataclass(frozen=True)
class FoundVectors:
    """What vectors a shard has, by name. Without samples there are no dimensions and makers."""

    num_samples: int
    digests: dict[str, str]
    dims: dict[str, int]
    makers: dict[str, str]

    @property
    def text(self) -> str:
        """NAME=DIGEST of each, by name."""
        return " ".join(f"{name}={digest}" for name, digest in sorted(self.digests.items()))


def find_vectors(task: FindVectors) -> FoundVectors:
    """Return what vectors a shard has.

    Raises:
        DataError: some are not there, damaged, or made for another state of the index.
    """
    info = read_index_info(task.index)
    if info is not None and not info.num_samples:
        return FoundVectors(0, dict.fromkeys(task.names, ""), {}, {})
    digests, dims, makers = {}, {}, {}
    for name in task.names:
        read_vectors(task.index, name)
        made = _read_info(vectors_path(task.index, name))
        digests[name], dims[name], makers[name] = made.digest, made.dim, made.made_by
    return FoundVectors(info.num_samples if info else 0, digests, dims, makers)


def _read_info(path: Path) -> VectorsInfo:
    """Return what stands behind the vectors in a file.

    Raises:
        FileNotFoundError: there is none.  DataError: it is not one of `write_vectors`, or not whole
    """
    try:
        with open(path, "rb") as file:
            shape, is_fortran, dtype = _read_header(file)
            file.seek(int(np.prod(shape)) * dtype.itemsize, 1)
            fields = json.loads(npy.read_array(file, allow_pickle=False).tobytes())
        info = VectorsInfo(**fields)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise DataError(
            f"{path} holds no vectors of ours ({error}). Remove it and make them with `pairmill "
            "score`; those of another program are brought in by curation.vectors.write_vectors."
        ) from None
    if (
        info.version != VERSION
        or dtype != DTYPE
        or is_fortran
        or shape
        != (
            info.num_samples,
            info.dim,
        )
    ):
        raise DataError(
            f"{path}: got {dtype} {list(shape)} of version {info.version}; expected float16 "
            f"{[info.num_samples, info.dim]} of version {VERSION}. Remove it and make it again "
            "with `pairmill score`."
        )
    return info


def _read_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    if npy.read_magic(file) != (1, 0):
        raise ValueError("an npy file of another version")
    header: tuple[tuple[int, ...], bool, np.dtype[Any]] = npy.read_array_header_1_0(file)
    return header


def _advise(path: Path, why: str, name: str) -> str:
    return (
        f"{path}: {why}. `pairmill score` makes the vectors {name!r} of every shard of a job: run "
        "it with the configuration that reads these shards, then the same line again."
    )
