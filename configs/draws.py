"""Randomness as a function: every draw is hash(seed, purpose, uid or global position).

Nothing here holds state, so a draw does not depend on workers, ranks, order or restarts (DESIGN
section 3). The mixer is the finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), chained
over the words of the counter; it is written in numpy uint64 arithmetic, which is exact and the same
on every platform and version. Numpy's own generators are not used: their distributions may change
by version.

Symbols: `seed` any int; `purpose` a short constant such as "balance/draw" that keeps two uses of
one seed apart; `words` arrays of unsigned 64-bit integers that broadcast against each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: UInt64Array) -> UInt64Array:
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * _MIX_1
        x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def stream_key(seed: int, purpose: str) -> int:
    """Return the 64-bit key of the draws that `seed` makes for `purpose`."""
    digest = hashlib.blake2b(f"{seed}\0{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def bits(seed: int, purpose: str, *words: npt.ArrayLike) -> UInt64Array:
    """Return 64 random bits for each element of the broadcast `words` (at least one array)."""
    assert words, "a draw needs a counter: a uid or a position"
    state = np.uint64(stream_key(seed, purpose))
    out: UInt64Array = np.asarray(state)
    with np.errstate(over="ignore"):
        for word in words:
            out = _mix((out ^ np.asarray(word).astype(np.uint64)) + _GOLDEN)
    return out


def uniform(seed: int, purpose: str, *words: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return a draw from [0, 1), a multiple of 2**-53, for each element of the `words`."""
    return (bits(seed, purpose, *words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(size: int, seed: int, purpose: str, *words: int) -> npt.NDArray[np.int64]:
    """Return a permutation of range(size): the stable order of one draw an element.

    `words` are scalars that name this permutation (an epoch, a window).
    """
    keys = bits(seed, purpose, *(np.uint64(word) for word in words), np.arange(size))
    return np.argsort(keys, kind="stable")


def uid_words(uids: Sequence[bytes]) -> tuple[UInt64Array, UInt64Array]:
    """Split 16-byte uids into the two arrays of 64-bit words that a draw takes."""
    words = np.frombuffer(b"".join(uids), dtype="<u8").reshape(-1, 2)
    return words[:, 0], words[:, 1]
