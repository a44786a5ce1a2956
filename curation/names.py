"""Split the names of thousands of members at once, and group them to samples (see grouping.py).

For the usual tar: names of ASCII with a key and an extension, the members of a sample side by side,
no key twice. `split_names` and `group_names` say None for any other, which SampleGrouper does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from curation.plain_headers import NAME_BYTES, Bytes, Ints

_LONGEST_EXTENSION = 16
_MAX_EXTENSIONS = 60  # one bit each
_COLUMNS = np.arange(NAME_BYTES)


class Extensions:
    """Numbers the extensions of a tar, as they are met; `names` are lower-cased."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._code_of_name: dict[str, int] = {}
        self._code_of_text: dict[tuple[int, int], int] = {}

    def code(self, name: str) -> int:
        """Return the number of a lower-cased extension."""
        code = self._code_of_name.setdefault(name, len(self.names))
        if code == len(self.names):
            self.names.append(name)
        return code

    def known(self, name: str | None) -> int:
        """Return the number of an extension; -2: none of that name was met."""
        return self._code_of_name.get(name or "", -2)

    def codes(self, texts: Bytes) -> Ints | None:
        """Return the numbers of extensions, rows of 16 bytes of ASCII; None: there are too many."""
        first, last = np.ascontiguousarray(texts).view(np.uint64).T
        codes = np.full(len(texts), -1, np.int64)
        num_left = len(texts)
        for text, code in self._code_of_text.items():
            num_left -= _assign(codes, (first == text[0]) & (last == text[1]), code)
            if not num_left:
                break
        while num_left:
            row = int(codes.argmin())
            if len(self._code_of_text) >= _MAX_EXTENSIONS:
                return None
            text = int(first[row]), int(last[row])
            code = self.code(texts[row].tobytes().rstrip(b"\0").decode("ascii").lower())
            self._code_of_text[text] = code
            num_left -= _assign(codes, (first == text[0]) & (last == text[1]), code)
        return codes


def _assign(codes: Ints, which: npt.NDArray[np.bool_], code: int) -> int:
    codes[which] = code
    return int(np.count_nonzero(which))


class Names(NamedTuple):
    """Names of members: `texts[i, :dots[i]]` is the key of member i."""

    texts: Bytes
    dots: Ints
    codes: Ints  # of the extensions


def split_names(texts: Bytes, extensions: Extensions) -> Names | None:
    """Split names, rows of 100 bytes that end in NULs; None: some are not of the usual kind."""
    num = len(texts)
    room = np.zeros((num, NAME_BYTES + _LONGEST_EXTENSION + 1), np.uint8)
    room[:, :NAME_BYTES] = texts
    texts = np.ascontiguousarray(texts)
    is_text = texts != 0
    # ASCII; nothing behind the first NUL; no absolute path, no `..`.
    is_odd = (texts.max(initial=0) > 127) or (is_text[:, 1:] & ~is_text[:, :-1]).any()
    if is_odd or (texts[:, 0] == 47).any():
        return None
    dots_are = texts == 46
    slashes = texts == 47
    if slashes.any():
        if (dots_are[:, :-2] & dots_are[:, 1:-1] & slashes[:, 2:]).any():
            return None
        last = NAME_BYTES - 1 - slashes[:, ::-1].argmax(axis=1)
        last[~slashes.any(axis=1)] = -1
        dots_are &= last[:, None] < _COLUMNS
    else:
        last = np.full(num, -1)
    dots = dots_are.argmax(axis=1)
    begin = np.arange(num) * room.shape[1] + dots
    is_good = dots_are.ravel()[np.arange(num) * NAME_BYTES + dots] & (dots > last + 1)
    where = begin[:, None] + np.arange(1, _LONGEST_EXTENSION + 2)
    ends = room.ravel()[where]
    is_good &= (ends[:, 0] != 0) & (ends[:, _LONGEST_EXTENSION] == 0)
    if not is_good.all():
        return None
    codes = extensions.codes(ends[:, :_LONGEST_EXTENSION])
    return None if codes is None else Names(texts, dots, codes)


class Groups(NamedTuple):
    """Samples: `keys[i]` has the members `starts[i]` to `starts[i + 1]`."""

    keys: list[bytes]
    starts: Ints  # one more than samples


def group_names(parts: Sequence[Names]) -> tuple[Names, Groups] | None:
    """Group members to samples; None where a key comes again, or an extension within a sample."""
    if not parts:
        return None
    names = Names(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    texts, dots, codes = names
    is_same = texts[1:] == texts[:-1]
    differs_at = is_same.argmin(axis=1)
    # Of two equal names the extension comes twice, which is found below.
    is_equal = is_same.ravel()[np.arange(len(is_same)) * NAME_BYTES + differs_at]
    goes_on = (dots[1:] == dots[:-1]) & ((differs_at > dots[1:]) | is_equal)
    starts = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    found = np.bitwise_or.reduceat(np.uint64(1) << codes.astype(np.uint64), starts)
    starts = np.append(starts, len(texts))
    if (np.bitwise_count(found) != np.diff(starts)).any():
        return None
    first = starts[:-1]
    keys = np.where(dots[first, None] > _COLUMNS, texts[first], np.uint8(0))
    listed: list[bytes] = keys.view(f"S{NAME_BYTES}").ravel().tolist()
    return (names, Groups(listed, starts)) if len(set(listed)) == len(listed) else None
