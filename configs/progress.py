"""Progress of long work on stderr: a bar on a terminal, plain lines in a log file.

    with progress("scan", total=64, unit="shards") as bar:
        for done in ...:
            bar.advance(1, samples=done.samples)

A log file gets no control characters: one line at the start of each interval, one at the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_INTERVAL_SECONDS = 10.0


def format_duration(seconds: float) -> str:
    """Write seconds for people: 7 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass
class Bar:
    """Counts finished units and samples; says the rate and the time left."""

    label: str
    total: int
    unit: str
    done: int = 0
    samples: int = 0
    started: float = field(default_factory=time.monotonic)
    _printed: float = 0.0
    _rich: Progress | None = None
    _task: int = 0

    def advance(self, units: int = 1, *, samples: int = 0) -> None:
        """Count `units` more as finished, and the samples that were in them."""
        self.done += units
        self.samples += samples
        if self._rich is not None:
            self._rich.update(self._task, completed=self.done, rate=self._rate())  # type: ignore[arg-type]
        elif time.monotonic() - self._printed > LOG_INTERVAL_SECONDS and self.done < self.total:
            self._print()

    def _rate(self) -> str:
        if not self.samples:
            return ""
        return f"{self.samples / max(time.monotonic() - self.started, 1e-9):,.0f} samples/s"

    def _print(self) -> None:
        self._printed = time.monotonic()
        elapsed = self._printed - self.started
        parts = [f"{self.label}: {self.done:,}/{self.total:,} {self.unit}"]
        if self.samples:
            parts += [f"{self.samples:,} samples", self._rate()]
        if 0 < self.done < self.total:
            parts.append(f"ETA {format_duration(elapsed / self.done * (self.total - self.done))}")
        else:
            parts.append(f"{format_duration(elapsed)}")
        print(", ".join(part for part in parts if part), file=sys.stderr, flush=True)


@contextmanager
def progress(label: str, *, total: int, unit: str) -> Iterator[Bar]:
    """Show the progress of `total` units of work while the block runs."""
    bar = Bar(label, total, unit)
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]} {task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as shown:
            bar._rich = shown
            bar._task = shown.add_task(label, total=total, unit=unit, rate="")
            yield bar
            return
    bar._printed = bar.started
    yield bar
    bar._print()
