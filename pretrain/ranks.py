"""What ranks do together outside of the mathematics: agree, and fail together.

A rank that raises alone leaves the others waiting in a collective until it times out. So what one
rank does for all goes through `on_first_rank`, and the loop agrees on errors before each step.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from configs.errors import DataError

Result = TypeVar("Result")
Stop = Callable[[int], bool]
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def on_first_rank(function: Callable[[], Result]) -> Result:
    """Run `function` on rank 0 and return its result, or raise its error, on every rank.

    Without process group (a dry run) this process is rank 0.
    """
    if not dist.is_initialized():
        return function()
    outcome: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            outcome = [(function(), None)]
        except Exception as error:  # whatever it is, every rank must hear of it
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    checked: Result = result
    return checked


_HOST_GROUPS: dict[Any, Any] = {}


def host_group() -> Any:
    """Return the group of all ranks that talks on the host: what is said in it does not wait for
    the device's queue. Every rank must call it the first time.
    """
    everyone = dist.group.WORLD
    if everyone not in _HOST_GROUPS:
        is_on_host = dist.get_backend() == "gloo"
        _HOST_GROUPS[everyone] = everyone if is_on_host else dist.new_group(backend="gloo")
    return _HOST_GROUPS[everyone]


class StopRequest:
    """SIGTERM and SIGUSR1 set a flag; all ranks agree on it, and on errors, before each step."""

    def __init__(self, stop: Stop | None) -> None:
        self._stop = stop
        self._signalled = False
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        # not print: its buffer may be in use where the signal interrupts
        os.write(2, f"{signal.Signals(number).name}: saving after this step\n".encode())

    def agreed(self, step_number: int, error: Exception | None = None) -> bool:
        """Return whether any rank was asked to stop; every rank must call it before each step.

        Raises `error` on the rank that has one, and a DataError that points there on the others.
        """
        wanted = self._signalled or (self._stop is not None and self._stop(step_number))
        if dist.get_world_size() == 1:
            if error is not None:
                raise error
            return wanted
        flags = torch.tensor([float(wanted), float(error is not None)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=host_group())
        if error is not None:
            raise error
        if flags[1]:
            raise DataError(
                "another rank could not read its part of the batch; its message says why."
            )
        return bool(flags[0])

    def restore_handlers(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
