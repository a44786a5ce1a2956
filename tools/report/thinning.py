"""Draw a long series without hiding what stands out.

A run logs 100,000 rows; a chart is some hundred pixels wide. Taking every n-th row would drop the
spikes that one looks for, so each pixel column keeps its first, least, largest and last point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Point = tuple[float, float]
MAX_POINTS = 240
NUM_COLUMNS = 384  # pixels of the plot area at its natural size
NUM_HOVERS = 96


@dataclass(frozen=True)
class Hover:
    """What stands under the pointer: one point, or the range of several (count > 1)."""

    at: Point  # where it is drawn: the last of them
    first_x: float
    low: float
    high: float
    count: int
    flag: str | None = None  # why some of them are flagged


@dataclass(frozen=True)
class Thinned:
    """The points of the line, and what can be pointed at."""

    line: list[Point]
    hovers: list[Hover]
    is_thinned: bool


def thin(
    points: Sequence[Point],
    place: Callable[[float], float],
    start: float,
    flagged: Mapping[Point, str],
) -> Thinned:
    """Return a series as drawn. `place` maps x to pixels, of which `start` is the plot's first.

    A short series keeps every point; the points must come in the order of x.
    """
    if len(points) <= MAX_POINTS:
        hovers = [Hover(p, p[0], p[1], p[1], 1, flagged.get(p)) for p in points]
        return Thinned(list(points), hovers, is_thinned=False)
    columns: dict[int, list[Point]] = {}
    for point in points:
        columns.setdefault(int(place(point[0]) - start), []).append(point)
    line = [point for column in columns.values() for point in _extremes(column)]
    wide = NUM_COLUMNS // NUM_HOVERS
    groups: dict[int, list[Point]] = {}
    for number, column in columns.items():
        groups.setdefault(number // wide, []).extend(column)
    hovers = []
    for group in groups.values():
        heights = [y for _, y in group]
        why = [flagged[point] for point in group if point in flagged]
        flag = f"{len(why):,} rows {why[0]}" if why else None
        low, high = min(heights), max(heights)
        hovers.append(Hover(group[-1], group[0][0], low, high, len(group), flag))
    return Thinned(line, hovers, is_thinned=True)


def _extremes(column: list[Point]) -> list[Point]:
    """Return the first, least, largest and last point, each once, in their order."""
    places = range(len(column))
    least = min(places, key=lambda i: column[i][1])
    largest = max(places, key=lambda i: column[i][1])
    return [column[i] for i in sorted({0, least, largest, len(column) - 1})]
