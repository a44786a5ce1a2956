"""Run one task in a worker. It imports next to nothing: what a worker imports is time of its first
task, and Ray and the configuration are not needed there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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


class Actor:
    """A worker that keeps what `make` returned. What `make` raised, every task raises."""

    def __init__(self, make: Callable[[Any], Any], argument: Any) -> None:
        keep_pandas_out()
        self._state: Any = None
        self._error: Exception | None = None
        try:
            self._state = make(argument)
        except Exception as error:  # carried to the driver, which shows it once
            self._error = error

    def run(self, function: Callable[[Any, Any], Any], task: Any) -> Any:
        """Return what a task comes to, or Failed."""
        return run_task(partial(self._do, function), task)

    def _do(self, function: Callable[[Any, Any], Any], task: Any) -> Any:
        if self._error is not None:
            raise self._error
        return function(self._state, task)
