"""Check thousands of plain headers of a tar at once, and take the names from them.

Plain: ustar or older, its numbers octal, its check sum right, its name not empty. For all other
headers there is tar_headers.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from curation.tar_headers import BLOCK

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

NAME_BYTES = 100
_USTAR = np.frombuffer(b"ustar\0", np.uint8)  # GNU's own magic keeps other things in the prefix
_CHECKSUM_WEIGHTS = 8 ** np.arange(5, -1, -1, dtype=np.int64)


def header_blocks(data: bytes | bytearray, positions: Ints) -> Bytes:
    """Return the blocks of 512 bytes at some positions, one a row."""
    if (positions % BLOCK).any():
        joined = b"".join([data[p : p + BLOCK] for p in positions.tolist()])
        return np.frombuffer(joined, np.uint8).reshape(-1, BLOCK)
    blocks = np.frombuffer(data, np.uint8, len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
    rows: Bytes = blocks[positions // BLOCK]
    return rows


def are_plain(blocks: Bytes) -> npt.NDArray[np.bool_]:
    """Tell which headers are plain and good."""
    stored = blocks[:, 148:154] - np.uint8(48)
    sums = blocks.sum(axis=1, dtype=np.uint32).astype(np.int64) + 256
    sums -= blocks[:, 148:156].sum(axis=1, dtype=np.uint32)
    is_good = (stored < 8).all(axis=1) & (stored.astype(np.int64) @ _CHECKSUM_WEIGHTS == sums)
    is_good &= (blocks[:, 124:135] - np.uint8(48) < 8).all(axis=1)
    is_good &= ((blocks[:, 135] == 0) | (blocks[:, 135] == 32)) & (blocks[:, 0] != 0)
    found: npt.NDArray[np.bool_] = is_good
    return found


def prefixed_names(blocks: Bytes) -> Iterator[tuple[int, str]]:
    """Yield (row, name) of the headers that keep a part of the name in ustar's prefix."""
    has_prefix = (blocks[:, 257:263] == _USTAR).all(axis=1) & (blocks[:, 345] != 0)
    for row in np.flatnonzero(has_prefix).tolist():
        prefix, name = (
            part.tobytes().split(b"\0", 1)[0]
            for part in (blocks[row, 345:500], blocks[row, :NAME_BYTES])
        )
        yield row, (prefix + b"/" + name).decode("utf-8", "backslashreplace")


def decode_names(raw: Bytes, others: dict[int, str]) -> list[str]:
    """Return the names of headers; `others` has those that are not in the rows of `raw`."""
    if not len(raw):
        return []
    texts = np.ascontiguousarray(raw).view(f"S{NAME_BYTES}").ravel().tolist()
    joined = b"\n".join(texts)
    names: list[str] = []
    if b"\0" not in joined and joined.count(b"\n") == len(texts) - 1:
        try:
            names = joined.decode().split("\n")
        except UnicodeDecodeError:
            names = []
    if not names:
        names = [text.split(b"\0", 1)[0].decode("utf-8", "backslashreplace") for text in texts]
    for row, name in others.items():
        names[row] = name
    return names
