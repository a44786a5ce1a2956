"""The errors that a user sees: what happened, what was got, what was expected, what to do.

    PairmillError            one paragraph for the user; exit code 1
    ├── UsageError           the command or a path on it is wrong; exit code 2
    │   └── ConfigError      a configuration file or override is wrong; exit code 2
    ├── DataError            a shard, index, manifest, dataset or image is not what it should be
    ├── CheckpointError      a checkpoint is missing, damaged or of another kind
    └── TrainingError        training cannot go on: the loss is not finite

`assert` is for our own invariants only. The `pairmill` command prints a `PairmillError` without a
traceback (with one under PAIRMILL_TRACEBACK=1); anything else is a bug of ours and keeps its
traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PairmillError(Exception):
    """A problem that the user can mend; its text says how."""

    exit_code = 1


class UsageError(PairmillError):
    """The command line is wrong, or names something that is not there."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration is wrong. The message lists every problem of the file at once."""


class DataError(PairmillError):
    """A shard, index, manifest, dataset or image is not what it should be."""


class TrainingError(PairmillError):
    """Training cannot go on."""


class CheckpointError(PairmillError):
    """A checkpoint is missing, damaged, or not a checkpoint."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """End a sentence about an unknown name: ", did you mean 'x'?" where one is near, else "."."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else "."
