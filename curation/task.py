"""Run one task in a worker. It imports next to nothing: what a worker imports is time of its first
task, and Ray and the configuration are not needed there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from configs.errors import DataError, PairmillError
from curation.arrow import keep_pandas_out


class Failed:
    """A task's error, carried back as a value: Ray would wrap it in a page of traceback."""

    def __init__(self, error: PairmillError) -> None:
        self.error = error


def run_task(function: Callable[[Any], Any], task: Any) -> Any:
    """Return what a task comes to, or Failed."""
    keep_pandas_out()
    try:
        return function(task)
    except PairmillError as error:
        return Failed(error)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        text = f"{task}: {error.strerror or error}{where}. Mend that, and run the same line again."
        return Failed(DataError(text))
