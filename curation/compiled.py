"""Compile inner loops with numba, once a machine.

The machine code is kept beside the loops' file or in the user's cache (`NUMBA_CACHE_DIR`); where
neither can be written, each process compiles for itself. numba takes half a second to import, so
that only what scans tars comes here.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, cast

from curation.lean import kept_out

with kept_out("scipy"):  # numba looks for its linear algebra, and takes twice as long for it
    import numba.np.arraymath  # noqa: F401 - the module that looks
    from numba import njit

_F = TypeVar("_F", bound=Callable[..., object])


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Let the other processes of this machine wait: they will find what this one compiles."""
    path = Path(tempfile.gettempdir()) / f"pairmill-compiles-{os.getuid()}.lock"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:  # then each compiles for itself, to the same end
        yield
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def compiled(signature: object) -> Callable[[_F], _F]:
    """Compile a function for one signature, or take the machine code that is kept of it.

    numba looks at the function's own file to see whether that is still good. It must not call a
    compiled function of another file that is likely to change.
    """

    def decorate(function: _F) -> _F:
        with _one_at_a_time():
            try:
                return cast(_F, njit(signature, cache=True, nogil=True)(function))
            except RuntimeError as error:  # no place where it could be kept
                if "no locator available" not in str(error):
                    raise
                return cast(_F, njit(signature, nogil=True)(function))

    return decorate
