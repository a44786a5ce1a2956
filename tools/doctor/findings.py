"""What one look at the machine found."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Level(Enum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"  # something works less well, or is not there and need not be
    PROBLEM = "PROBLEM"  # what the user wants to run will fail


class Finding(NamedTuple):
    """One line of the doctor's: what was looked at, what was found, and what to do about it."""

    level: Level
    what: str
    found: str
    advice: str = ""

    def __str__(self) -> str:
        """Return the line, with the advice below it."""
        line = f"{self.level.value:<8} {self.what:<14} {self.found}"
        return f"{line}\n{'':24}-> {self.advice}" if self.advice else line


def ok(what: str, found: str) -> Finding:
    """Return a finding that asks for nothing."""
    return Finding(Level.OK, what, found)


def note(what: str, found: str, advice: str) -> Finding:
    """Return a finding that something works less well."""
    return Finding(Level.NOTE, what, found, advice)


def problem(what: str, found: str, advice: str) -> Finding:
    """Return a finding that something will fail."""
    return Finding(Level.PROBLEM, what, found, advice)
