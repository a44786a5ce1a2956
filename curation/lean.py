"""Imports without what they bring along and nothing here uses: a second of each worker's start; and
imports that a cancelled task does not leave half done.
"""

from __future__ import annotations

import signal
import sys
import threading
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


@contextmanager
def whole_imports() -> Iterator[None]:
    """Let nothing interrupt what is imported.

    Ray cancels a task by an interrupt of its worker, which goes on to other tasks. Packages whose
    modules import each other (numba) cannot be imported again after half an import.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # interrupts come to the main thread
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
