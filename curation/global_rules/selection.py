"""Find the k smallest of a pool exactly, in bounded memory, ties broken by uid.

Each sample has a 64-bit key; (key, uid) are 192 bits that no two samples share. Passes over the
shards count the samples by the next 16 bits of those that share all bits before with the k-th
smallest; once few are left they are collected. So the k-th smallest is found in two or three
passes, whatever the number of samples, and does not depend on how they are spread over shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation.global_rules.base import Pool, ShardPart

UInt64Array = npt.NDArray[np.uint64]
_BITS = 16
_DIGITS_A_WORD = 64 // _BITS
_MAX_COLLECTED = 1 << 16
# A candidate as the driver keeps it: its key and both halves of its uid.
_CANDIDATE = np.dtype([("key", "<u8"), ("high", "<u8"), ("low", "<u8")])


class Keys(NamedTuple):
    """The samples of a shard that take part: their group, keys and uids."""

    group: str
    keys: UInt64Array
    uids: pa.Array


KeysOf = Callable[[ShardPart], Keys]


class Bound(NamedTuple):
    """The k-th smallest (key, uid) of a group; what is not above it is selected."""

    key: int
    uid: str  # hexadecimal

    def holds(self, keys: UInt64Array, uids: pa.Array) -> npt.NDArray[np.bool_]:
        """Return for each sample whether it is among the k smallest."""
        held: npt.NDArray[np.bool_] = keys < np.uint64(self.key)
        for row in np.flatnonzero(keys == np.uint64(self.key)):
            held[row] = uids[row].as_py().hex() <= self.uid
        return held


def key_of_float(values: npt.NDArray[np.float64]) -> UInt64Array:
    """Return keys that sort as the values do; -0.0 equals 0.0. NaN has no place."""
    raw = (values + 0.0).view(np.uint64)
    sign = np.uint64(1 << 63)
    return np.where(raw & sign, ~raw, raw | sign)


@dataclass(frozen=True)
class _Open:
    """A group whose k-th smallest is not known yet: its first digits, and how many are left."""

    digits: tuple[int, ...]
    k: int  # rank, from 1, among the samples with those digits
    num_samples: int


@dataclass(frozen=True)
class _Step:
    keys_of: KeysOf
    groups: dict[str, _Open]


def _words(found: Keys) -> tuple[UInt64Array, UInt64Array, UInt64Array]:
    raw = np.frombuffer(b"".join(found.uids.to_pylist()), dtype=">u8").reshape(-1, 2)
    return found.keys, raw[:, 0].astype(np.uint64), raw[:, 1].astype(np.uint64)


def _digit(words: tuple[UInt64Array, ...], number: int) -> UInt64Array:
    word, place = divmod(number, _DIGITS_A_WORD)
    shift = np.uint64(64 - _BITS * (place + 1))
    return (words[word] >> shift) & np.uint64((1 << _BITS) - 1)


def _inside(words: tuple[UInt64Array, ...], digits: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    inside = np.ones(len(words[0]), dtype=bool)
    for number, digit in enumerate(digits):
        inside &= _digit(words, number) == np.uint64(digit)
    return inside


def _count_digits(part: ShardPart, step: _Step) -> tuple[str, list[int], list[int]]:
    found = step.keys_of(part)
    if found.group not in step.groups or not len(found.keys):
        return found.group, [], []
    digits = step.groups[found.group].digits
    words = _words(found)
    values, counts = np.unique(
        _digit(words, len(digits))[_inside(words, digits)], return_counts=True
    )
    return found.group, values.tolist(), counts.tolist()


def _collect(part: ShardPart, step: _Step) -> tuple[str, npt.NDArray[np.void]]:
    found = step.keys_of(part)
    if found.group not in step.groups or not len(found.keys):
        return found.group, np.zeros(0, _CANDIDATE)
    words = _words(found)
    inside = _inside(words, step.groups[found.group].digits)
    candidates = np.zeros(int(inside.sum()), _CANDIDATE)
    for name, word in zip(_CANDIDATE.names or (), words, strict=True):
        candidates[name] = word[inside]
    return found.group, candidates


def select_smallest(
    pool: Pool, keys_of: KeysOf, sizes: Mapping[str, int], wanted: Mapping[str, int]
) -> dict[str, Bound]:
    """Return the bound of each group of `wanted`: its k-th smallest (key, uid), 1 <= k <= size.

    `sizes` are the numbers of samples of the groups. `keys_of` is a module-level function, or a
    functools.partial of one.
    """
    still = {}
    for group, k in wanted.items():
        assert 1 <= k <= sizes[group], f"{k} of {sizes[group]} in {group!r}"
        still[group] = _Open((), k, sizes[group])
    while large := {name: g for name, g in still.items() if g.num_samples > _MAX_COLLECTED}:
        bins: dict[str, npt.NDArray[np.int64]] = {
            name: np.zeros(1 << _BITS, np.int64) for name in large
        }
        for _, (group, values, counts) in pool.map(
            _count_digits, _Step(keys_of, large), step="find the threshold"
        ):
            if values:
                bins[group][values] += counts
        still |= {name: _narrow(group, bins[name]) for name, group in large.items()}
    candidates = {name: bytearray() for name in still}
    if still:
        for _, (group, some) in pool.map(
            _collect, _Step(keys_of, still), step="find the threshold"
        ):
            if len(some):
                candidates[group] += some.tobytes()
    return {name: _smallest(candidates[name], group.k) for name, group in still.items()}


def _smallest(candidates: bytearray, k: int) -> Bound:
    """Return the k-th of the candidates, from 1."""
    found = np.frombuffer(candidates, _CANDIDATE)
    key, high, low = found[np.lexsort((found["low"], found["high"], found["key"]))[k - 1]].tolist()
    return Bound(key, f"{high:016x}{low:016x}")


def _narrow(group: _Open, counts: npt.NDArray[np.int64]) -> _Open:
    up_to = np.cumsum(counts)
    digit = int(np.searchsorted(up_to, group.k))
    before = int(up_to[digit] - counts[digit])
    return _Open((*group.digits, digit), group.k - before, int(counts[digit]))
