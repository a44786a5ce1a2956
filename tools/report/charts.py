"""Line charts and histograms as inline SVG: no script, colours from the page's CSS.

Series differ by colour and by dashes; every point says its numbers under the pointer (a `<title>`).
A long series is drawn as the least and the largest of each pixel column (thinning.py), and says so.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from tools.report.html import Html, element, join
from tools.report.thinning import NUM_COLUMNS, Hover, Point, thin

WIDTH, HEIGHT = 460, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 48
NUM_STYLES = 6


@dataclass(frozen=True)
class Series:
    """A named line. Points that cannot be drawn (not finite, <= 0 on a log axis) are left out."""

    name: str
    points: Sequence[Point]
    bounds: Sequence[Point] = ()  # (low, high) of each point: drawn as whiskers
    flagged: Mapping[Point, str] = field(default_factory=dict)  # drawn as rings; why


@dataclass(frozen=True)
class Mark:
    """Something that happened at one place of the x axis: drawn as an upright line."""

    x: float
    kind: str  # one of MARKS
    said: str


MARKS = {
    "stage": "stage begins",
    "restart": "restart",
    "skipped": "steps skipped",
    "back": "went back",
}


_TINY = 1e-300
_CHARACTER = 7  # width of one in a label, about


@dataclass(frozen=True)
class Axis:
    """An axis: what it shows, with its unit, and whether it is logarithmic."""

    title: str
    is_log: bool = False
    starts_at_zero: bool = False
    marked: tuple[float, ...] = ()  # the values to write at it; chosen where there are none


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    is_log: bool
    start: float
    end: float
    marked: tuple[float, ...] = ()

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.is_log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        return round(self.start + (at - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        if self.marked:
            return list(self.marked)
        return _log_ticks(self.low, self.high) if self.is_log else _ticks(self.low, self.high)


def short_number(value: float) -> str:
    """Write a number for an axis: 1.5k, 20M, 0.004, 7.5e-4."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def line_chart(
    title: str, series: Sequence[Series], x: Axis, y: Axis, marks: Sequence[Mark] = ()
) -> Html:
    """Return a figure with one line a series; says so where there is nothing to draw."""
    drawn = [
        s if s.bounds else Series(s.name, _drawable(s.points, x, y), flagged=s.flagged)
        for s in series
    ]
    points = [point for s in drawn for point in s.points]
    if not points:
        return _figure(title, [element("p", "Nothing to draw yet.")], [])
    heights = [p[1] for p in points] + [end for s in drawn for pair in s.bounds for end in pair]
    x_scale = _scale([p[0] for p in points], x, _LEFT, WIDTH - _RIGHT)
    y_scale = _scale(heights, y, HEIGHT - _BOTTOM, _TOP)
    lines, longest = [], 0
    for number, s in enumerate(drawn):
        # Whiskers of neighbours side by side, not on top of each other.
        aside = 3.0 * (number - (len(drawn) - 1) / 2)
        for (low, high), (at, _) in zip(s.bounds, s.points, strict=False):
            ends = {"x1": x_scale(at) + aside, "x2": x_scale(at) + aside}
            ends |= {"y1": y_scale(low), "y2": y_scale(high)}
            lines.append(element("line", **ends, class_=f"bound s{number % NUM_STYLES}"))
        thinned = thin(s.points, x_scale, _LEFT, s.flagged)
        longest = max(longest, len(s.points) if thinned.is_thinned else 0)
        path = " ".join(f"{x_scale(a)},{y_scale(b)}" for a, b in thinned.line)
        lines.append(element("polyline", points=path, class_=f"line s{number % NUM_STYLES}"))
        for hover in thinned.hovers:
            lines.append(_dot(s, hover, x, y, x_scale, y_scale, number))
    axes = _axes(x, y, x_scale, y_scale)
    shown = [_mark(mark, x_scale) for mark in marks if x_scale.low <= mark.x <= x_scale.high]
    kinds = [kind for kind in MARKS if any(mark.kind == kind for mark in marks)]
    flags = sorted({why for s in drawn for why in s.flagged.values()})
    notes = [_mark_key(kind) for kind in kinds] + [_flag_key(why) for why in flags]
    if longest:
        said = f"{longest:,} rows, drawn as the least and largest of each of {NUM_COLUMNS} columns"
        notes.append(element("span", said, class_="key"))
    return _figure(
        title,
        [_svg(title, [*axes, *shown, *lines])],
        [s.name for s in drawn],
        note=element("p", join(notes), class_="notes") if notes else None,
    )


def _dot(
    s: Series,
    hover: Hover,
    x: Axis,
    y: Axis,
    x_scale: _Scale,
    y_scale: _Scale,
    number: int,
) -> Html:
    """Return what can be pointed at, with its numbers; a ring where it is flagged."""
    flag = hover.flag
    if hover.count == 1:
        said = f"{s.name}: {x.title} {hover.at[0]:,.6g}, {y.title} {hover.low:,.6g}"
    else:
        said = (
            f"{s.name}: {x.title} {hover.first_x:,.6g} to {hover.at[0]:,.6g}, {y.title} "
            f"{hover.low:,.6g} to {hover.high:,.6g} ({hover.count:,} rows)"
        )
    at_x, at_y = x_scale(hover.at[0]), y_scale(hover.at[1])
    dot = element("circle", cx=at_x, cy=at_y, r=2.5)
    # Neighbours of a long series are 4 apart: a larger one would lie over the next.
    hit = element("circle", cx=at_x, cy=at_y, r=7 if hover.count == 1 else 2, class_="hit")
    title = element("title", f"{said}; {flag}" if flag else said)
    style = f"dot s{number % NUM_STYLES}{' flagged' if flag else ''}"
    return element("g", title, dot, hit, class_=style)


def _mark(mark: Mark, x_scale: _Scale) -> Html:
    at = x_scale(mark.x)
    line = element("line", x1=at, x2=at, y1=_TOP, y2=HEIGHT - _BOTTOM)
    hit = element("rect", x=at - 4, y=_TOP, width=8, height=10)
    return element("g", element("title", mark.said), line, hit, class_=f"event e-{mark.kind}")


def _mark_key(kind: str) -> Html:
    line = element("line", x1=4, x2=4, y1=0, y2=14)
    swatch = element("svg", element("g", line, class_=f"event e-{kind}"), viewBox="0 0 8 14",
                     width=8, height=14, aria_hidden="true")  # fmt: skip
    return element("span", swatch, " ", MARKS[kind], class_="key")


def _flag_key(why: str) -> Html:
    ring = element("g", element("circle", cx=6, cy=6, r=2.5), class_="dot s1 flagged")
    swatch = element("svg", ring, viewBox="0 0 12 12", width=12, height=12, aria_hidden="true")
    return element("span", swatch, " ", why, class_="key")


def histogram(
    title: str,
    edges: Sequence[float],
    before: Sequence[int],
    after: Sequence[int],
    x_title: str,
    limits: Mapping[str, float] = MappingProxyType({}),
) -> Html:
    """Return a figure with the counts of each bin, those after in front of those before.

    Bin i holds edges[i] <= value < edges[i + 1], the last one all above. Bins are drawn equally
    wide, whatever they hold. `limits` are drawn as lines: what each says, and where it is.
    """
    used = [i for i, count in enumerate(before) if count]
    if not used:
        return _figure(title, [element("p", "Nothing to draw yet.")], [])
    bins = range(used[0], used[-1] + 1)
    y = Axis("samples", starts_at_zero=True)
    y_scale = _scale([float(before[i]) for i in bins], y, HEIGHT - _BOTTOM, _TOP)
    step = (WIDTH - _LEFT - _RIGHT) / len(bins)
    parts = _y_axis(y, y_scale)
    longest = max(len(f"{edges[i]:,}") for i in bins)
    every = max(math.ceil(len(bins) / 9), math.ceil((longest + 1) * _CHARACTER / step))
    for place, i in enumerate(bins):
        left = _LEFT + place * step
        end = f"to below {edges[i + 1]:,}" if i + 1 < len(edges) else "and above"
        said = f"{edges[i]:,} {end}: {before[i]:,} before, {after[i]:,} after"
        bars = [
            _bar(left, step, y_scale, count, n) for n, count in enumerate((before[i], after[i]))
        ]
        parts.append(element("g", element("title", said), *bars))
        if place % every == 0:
            parts.append(_label(left, HEIGHT - _BOTTOM + 17, f"{edges[i]:,}", "middle"))
    for said, value in limits.items():
        at = _LEFT + step * _place_of(value, [edges[i] for i in bins])
        line = element("line", x1=at, x2=at, y1=_TOP, y2=HEIGHT - _BOTTOM)
        hit = element("rect", x=at - 4, y=_TOP, width=8, height=10)
        parts.append(element("g", element("title", said), line, hit, class_="event e-limit"))
    parts.append(_label((_LEFT + WIDTH) / 2, HEIGHT - 8, x_title, "middle"))
    return _figure(title, [_svg(title, parts)], ["before", "after"], is_filled=True)


def _place_of(value: float, edges: Sequence[float]) -> float:
    """Return where a value stands on bins of equal width, in bins from the left."""
    at = bisect_right(edges, value) - 1
    if at < 0 or at + 1 == len(edges):
        return float(min(max(at, 0), len(edges)))
    return at + (value - edges[at]) / (edges[at + 1] - edges[at])


def interval_strip(value: float, low: float, high: float, marks: dict[str, float]) -> Html:
    """Return a small strip from 0 to 1: the value, its interval, named marks (chance, ...)."""
    width = 150

    def at(fraction: float) -> float:
        return round(4 + min(max(fraction, 0.0), 1.0) * (width - 8), 1)

    said = f"{value:.1%}, 95 % interval {low:.1%} to {high:.1%}"
    said += "".join(f"; {name} {mark:.1%}" for name, mark in marks.items())
    parts = [element("line", x1=4, x2=width - 4, y1=11, y2=11, class_="grid")]
    for number, mark in enumerate(marks.values()):
        style = f"mark m{number}"
        parts.append(element("line", x1=at(mark), x2=at(mark), y1=3, y2=19, class_=style))
    parts.append(element("line", x1=at(low), x2=at(high), y1=11, y2=11, class_="whisker"))
    parts.append(element("circle", cx=at(value), cy=11, r=4, class_="value"))
    return element(
        "svg",
        element("title", said),
        *parts,
        viewBox=f"0 0 {width} 22",
        width=width,
        height=22,
        role="img",
        aria_label=said,
        class_="strip",
    )


def _drawable(points: Sequence[Point], x: Axis, y: Axis) -> list[Point]:
    # What is nearly subnormal is 0: a part of it would be none, and have no logarithm.
    flushed = ((a if abs(a) > _TINY else 0.0, b if abs(b) > _TINY else 0.0) for a, b in points)
    return [
        (a, b)
        for a, b in flushed
        if math.isfinite(a)
        and math.isfinite(b)
        and (a > 0 or not x.is_log)
        and (b > 0 or not y.is_log)
    ]


def _scale(values: Sequence[float], axis: Axis, start: float, end: float) -> _Scale:
    low, high = min(values), max(values)
    if axis.is_log:
        low, high = (low, high) if high > low else (low / 2, high * 2)
        if axis.marked:  # few points, with whiskers: away from the edges
            low, high = low / (high / low) ** 0.05, high * (high / low) ** 0.05
    else:
        low = min(low, 0.0) if axis.starts_at_zero else low
        pad = 0.04 * (high - low) or abs(high) or 1.0
        low, high = (low if axis.starts_at_zero else low - pad), high + pad
    return _Scale(low, high, axis.is_log, start, end, axis.marked)


def _ticks(low: float, high: float) -> list[float]:
    rough = (high - low) / 5
    power: float = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step)
    return [round(n * step, 12) for n in range(first, math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples: tuple[int, ...] = (1,) if math.log10(high / low) > 2 else (1, 2, 5)
    ticks = [m * 10.0**p for p in powers for m in multiples]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def _axes(x: Axis, y: Axis, x_scale: _Scale, y_scale: _Scale) -> list[Html]:
    parts = _y_axis(y, y_scale)
    bottom = HEIGHT - _BOTTOM
    for tick in x_scale.ticks():
        at = x_scale(tick)
        parts.append(element("line", x1=at, x2=at, y1=_TOP, y2=bottom, class_="grid"))
        parts.append(_label(at, bottom + 17, short_number(tick), "middle"))
    parts.append(_label((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 8, x.title, "middle"))
    return parts


def _y_axis(y: Axis, y_scale: _Scale) -> list[Html]:
    parts = []
    for tick in y_scale.ticks():
        at = y_scale(tick)
        parts.append(element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(_label(_LEFT - 6, at + 4, short_number(tick), "end"))
    middle = (_TOP + HEIGHT - _BOTTOM) / 2
    turned = f"translate(14 {middle}) rotate(-90)"
    parts.append(element("text", y.title, transform=turned, text_anchor="middle"))
    return parts


def _label(x: float, y: float, said: str, anchor: str) -> Html:
    return element("text", said, x=round(x, 1), y=round(y, 1), text_anchor=anchor)


def _bar(
    left: float, step: float, scale: Callable[[float], float], count: int, number: int
) -> Html:
    inset = (0.06 + 0.16 * number) * step
    top = scale(float(count))
    return element(
        "rect",
        x=round(left + inset, 2),
        y=top,
        width=round(step - 2 * inset, 2),
        height=round(HEIGHT - _BOTTOM - top, 1),
        class_=f"bar s{number}",
    )


def _svg(title: str, parts: Sequence[Html]) -> Html:
    return element(
        "svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=title, class_="chart"
    )


def _figure(
    title: str,
    content: Sequence[Html],
    names: Sequence[str],
    *,
    is_filled: bool = False,
    note: Html | None = None,
) -> Html:
    keys = []
    for number, name in enumerate(names):
        style = f"s{number % NUM_STYLES}"
        mark = (
            element("rect", x=2, y=1, width=20, height=10, class_=f"bar {style}")
            if is_filled
            else element("polyline", points="0,6 26,6", class_=f"line {style}")
        )
        swatch = element("svg", mark, viewBox="0 0 26 12", width=26, height=12, aria_hidden="true")
        keys.append(element("span", swatch, " ", name, class_="key"))
    legend = element("p", join(keys), class_="legend") if len(names) > 1 else None
    return element("figure", element("figcaption", title), legend, *content, note, class_="plot")
