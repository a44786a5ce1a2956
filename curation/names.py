"""Split the names of thousands of members at once, and group them to samples (see grouping.py).

For the usual tar: names of ASCII with a key and an extension, the members of a sample side by side,
no key twice. `split_names` and `NameGroups` say None for any other, which SampleGrouper does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

NAME_BYTES = 100  # of a header
_LONGEST_EXTENSION = 16
_MAX_EXTENSIONS = 60  # one bit each
_COLUMNS = np.arange(NAME_BYTES)


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


class Extensions:
    """Numbers the extensions of a tar, as they are met; `names` are lower-cased."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._code_of_name: dict[str, int] = {}
        # As they are written in names, in one case or another, 16 bytes each; and their numbers.
        self.texts = np.zeros((_MAX_EXTENSIONS, _LONGEST_EXTENSION // 8), np.uint64)
        self.codes = np.zeros(_MAX_EXTENSIONS, np.int64)
        self.num_texts = 0

    def code(self, name: str) -> int:
        """Return the number of a lower-cased extension."""
        code = self._code_of_name.setdefault(name, len(self.names))
        if code == len(self.names):
            self.names.append(name)
        return code

    def known(self, name: str | None) -> int:
        """Return the number of an extension; -2: none of that name was met."""
        return self._code_of_name.get(name or "", -2)

    def add_text(self, text: bytes) -> bool:
        """Take note of an extension as it is written, in ASCII; False: they are too many."""
        if self.num_texts == _MAX_EXTENSIONS:
            return False
        padded = text.ljust(_LONGEST_EXTENSION, b"\0")
        self.texts[self.num_texts] = np.frombuffer(padded, np.uint64)
        self.codes[self.num_texts] = self.code(text.decode("ascii").lower())
        self.num_texts += 1
        return True


class Names(NamedTuple):
    """Names of members: `texts[i, :dots[i]]` is the key of member i."""

    texts: Bytes
    dots: Ints
    codes: Ints  # of the extensions


def split_names(texts: Bytes, extensions: Extensions) -> Names | None:
    """Split names, rows of 100 bytes that end in NULs; None: some are not of the usual kind.

    Usual: ASCII, no absolute path and no `..`, a key and an extension of at most 16 bytes.
    """
    from curation import kernels

    texts = np.ascontiguousarray(texts)
    dots, codes = np.empty((2, len(texts)), np.int64)
    row = 0
    while True:
        row = kernels.split_names(texts, extensions.texts, extensions.num_texts, row, dots, codes)
        if row == kernels.NO_MORE:
            return Names(texts, dots, extensions.codes[codes])
        if row == kernels.ODD:
            return None
        name = texts[row].tobytes().rstrip(b"\0")
        if not extensions.add_text(name.rpartition(b"/")[2].partition(b".")[2]):
            return None


class NameGroups:
    """Groups members to samples while their names come in: `keys`, and where each one starts."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self._starts: list[Ints] = []
        self._num_names = 0
        self._known: set[bytes] = set()
        self._last: tuple[Bytes, int, int] = (np.zeros(NAME_BYTES, np.uint8), -1, 0)

    def add(self, names: Names) -> list[bytes] | None:
        """Add names; return the keys that are new.

        None where a key comes again, or an extension within a sample: no more can be added then.
        """
        from curation import kernels

        texts, dots, codes = names
        starts = np.empty(len(texts), np.int64)
        num, found = kernels.group_names(texts, dots, codes, starts, *self._last)
        if num == kernels.ODD:
            return None
        if len(texts):
            self._last = texts[-1], int(dots[-1]), found
        first = starts[:num]
        keys = np.where(dots[first, None] > _COLUMNS, texts[first], np.uint8(0))
        listed: list[bytes] = keys.view(f"S{NAME_BYTES}").ravel().tolist()
        self.keys += listed
        self._known.update(listed)
        self._starts.append(first + self._num_names)
        self._num_names += len(texts)
        return listed if len(self._known) == len(self.keys) else None

    def bounds(self) -> Ints:
        """Return where samples start: `keys[i]` has the members `[i]` to `[i + 1]` of this."""
        return np.concatenate([*self._starts, [self._num_names]]).astype(np.int64)
