"""Measure two things in turn in one run and print their ratio: machines are shared and noisy."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """`ours` and `theirs` in seconds, best of each; `ratio` > 1 says that ours is faster.

    `cpu_ratio` is that of CPU seconds, children included, which other work disturbs less than time.
    """

    name: str
    ours_s: float
    theirs_s: float
    spread: float
    cpu_ratio: float | None = None

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.theirs_s / self.ours_s

    @property
    def text(self) -> str:
        """One line of a table, of what nothing in particular is wanted of."""
        return f"{self.name:<52} {self.ours_s:>9.3f} s {self.theirs_s:>9.3f} s {self.ratio:>7.2f}x"

    def line(self, wanted: float) -> str:
        """Return one line of a table."""
        verdict = "ok" if self.ratio >= wanted else "SHORT"
        cpu = "" if self.cpu_ratio is None else f", CPU {self.cpu_ratio:.2f}x"
        return f"{self.text}  (wanted {wanted:.2f}x, spread {self.spread:.0%}{cpu})  {verdict}"


def seconds(function: Callable[[], object]) -> float:
    """Return the wall seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cpu_seconds() -> float:
    # `os.times` counts in steps of 10 ms.
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def seconds_and_cpu(function: Callable[[], object]) -> tuple[float, float]:
    """Return the wall seconds and the CPU seconds, of children too, of one call."""
    before = _cpu_seconds()
    return seconds(function), _cpu_seconds() - before


def alternate(
    name: str,
    ours: Callable[[], object],
    theirs: Callable[[], object],
    *,
    repeats: int = 5,
    before: Callable[[], object] = lambda: None,
) -> Ratio:
    """Time both `repeats` times in turn, so that noise falls on both; keep the best of each.

    `before` is called ahead of each, and not timed.
    """
    ours_found, theirs_found = [], []
    for _ in range(repeats):
        before()
        ours_found.append(seconds_and_cpu(ours))
        before()
        theirs_found.append(seconds_and_cpu(theirs))
    pairs = list(zip((s for s, _ in ours_found), (s for s, _ in theirs_found), strict=True))
    ratios = [b / a for a, b in pairs]
    our_cpu, their_cpu = (min(cpu for _, cpu in found) for found in (ours_found, theirs_found))
    spread = (max(ratios) - min(ratios)) / statistics.median(ratios)
    return Ratio(
        name, min(a for a, _ in pairs), min(b for _, b in pairs), spread, their_cpu / our_cpu
    )
