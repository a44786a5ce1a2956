"""Imports without what they bring along and nothing here uses: a second of each worker's start."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder


class _Absent(MetaPathFinder):
    """Says that there is no package of a name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, fullname: str, path: object, target: object = None) -> None:
        """Return None for any other module: whoever comes next may know it."""
        if fullname == self._name:
            raise ModuleNotFoundError("kept out", name=fullname)


@contextmanager
def kept_out(name: str) -> Iterator[None]:
    """Let nobody find a package while something else is imported, unless it is imported already."""
    if name in sys.modules:
        yield
        return
    finder = _Absent(name)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
