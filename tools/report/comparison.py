"""Comparisons: few-shot curves, paired differences, classes and confusions, ROC, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from evaluation.methods.mano import agreement
from evaluation.predictions import Comparison, compare
from evaluation.result import BASELINE, Result
from tools.report.charts import Axis, Series, line_chart
from tools.report.html import Html, details, element, table
from tools.report.sources import Scorecard

MAX_CLASSES = 120
_SIDE = 15  # pixels of a cell of the confusion matrix


def comparison_parts(scorecard: Scorecard) -> list[Html | None]:
    """Return what stands below the tables; nothing where there is nothing to show."""
    parts = [
        *_few_shot(scorecard.results),
        *_mano(scorecard.results),
        *_paired(scorecard),
        *_details(scorecard.details),
    ]
    return parts


def _few_shot(results: Sequence[Result]) -> list[Html | None]:
    """One chart a dataset and checkpoint: a line a method, zero-shot as the start."""

    def place(row: Result) -> tuple[str, str]:
        return row.dataset, row.checkpoint

    swept = [row for row in results if row.shots is not None and row.metric == "top1"]
    start = {place(r): r for r in results if r.method == "zero_shot" and r.metric == "top1"}
    charts = []
    tables = []
    below: list[str] = []
    for (dataset, checkpoint), group in groupby(sorted(swept, key=place), key=place):
        rows = list(group)
        series = []
        for label in sorted({_label(row) for row in rows}):
            own = sorted((r for r in rows if _label(r) == label), key=lambda r: r.shots or 0)
            bounds = [(100 * r.interval[0], 100 * r.interval[1]) for r in own if r.interval]
            series.append(Series(label, [(r.shots or 0, 100 * r.value) for r in own], bounds))
        shots = sorted({row.shots for row in rows if row.shots})
        zero = start.get((dataset, checkpoint))
        if zero is not None:
            ends = [(shots[0], 100 * zero.value), (shots[-1], 100 * zero.value)]
            series.insert(0, Series("zero-shot", ends))
        title = f"{dataset}, {checkpoint}"
        x = Axis("shots a class", is_log=True, marked=tuple(shots))
        y = Axis("top-1 accuracy, %")
        charts.append(line_chart(title, series, x, y))
        tables.append(_shots_table(title, rows, shots, zero))
        below += _below_start(title, rows, zero)
    if not charts:
        return []
    seeds = max(len(row.seeds) for row in swept)
    said = (
        f"Mean over {seeds} seeds; whiskers are 95 % intervals over seeds and test images. "
        "Hyperparameters come from validation, unless a method is marked."
    )
    note = (
        f"At the most shots not above its zero-shot start: {'; '.join(below)}."
        if below
        else ("At the most shots every method is above its zero-shot start.")
    )
    return [
        element("h3", "Few-shot"),
        element("p", said),
        element("p", note) if start else None,
        element("div", *charts, class_="charts"),
        *tables,
    ]


def _below_start(title: str, rows: Sequence[Result], zero: Result | None) -> list[str]:
    """Return what at the most shots is not above zero-shot, with both accuracies."""
    most = max(row.shots or 0 for row in rows)
    if zero is None:
        return []
    return [
        f"{_label(row)} on {title} ({100 * row.value:.1f} against {100 * zero.value:.1f} %)"
        for row in sorted(rows, key=_label)
        if row.shots == most and row.value <= zero.value
    ]


def _label(row: Result) -> str:
    return f"{row.method} (published protocol)" if row.compat == "published" else row.method


def _shots_table(
    title: str, rows: Sequence[Result], shots: Sequence[int], zero: Result | None
) -> Html:
    found = {(_label(row), row.shots): row for row in rows}
    cells: list[tuple[object, ...]] = []
    if zero is not None:
        cells.append(("zero-shot", *(f"{100 * zero.value:.1f}" for _ in shots)))
    for label in sorted({_label(row) for row in rows}):
        line: list[object] = [label]
        for shot in shots:
            row = found.get((label, shot))
            if row is None or row.interval is None:
                line.append("-")
                continue
            low, high = row.interval
            ends = element("span", f"({100 * low:.1f} to {100 * high:.1f})", class_="range")
            line.append(element("span", f"{100 * row.value:.1f} ", ends))
        cells.append(tuple(line))
    header = ("method", *(f"{shot} shot{'s' if shot > 1 else ''}" for shot in shots))
    return table(header, cells, caption=f"{title}: top-1 accuracy, % (95 % interval)")


def _mano(results: Sequence[Result]) -> list[Html]:
    """How well MaNo's score, which sees no label, follows the accuracy over the datasets."""
    measured = {
        (row.checkpoint, row.dataset, row.metric): row.value
        for row in results
        if row.method in ("mano", "zero_shot") and row.metric in ("mano_score", "top1")
    }
    both = sorted(
        (checkpoint, dataset)
        for checkpoint, dataset, metric in measured
        if metric == "mano_score" and (checkpoint, dataset, "top1") in measured
    )
    if not both:
        return []
    cells: list[tuple[object, ...]] = []
    notes = []
    for checkpoint, group in groupby(both, key=lambda pair: pair[0]):
        pairs = [(measured[c, d, "mano_score"], measured[c, d, "top1"], d) for c, d in list(group)]
        cells += [(checkpoint, d, f"{score:.4f}", f"{100 * top:.1f}") for score, top, d in pairs]
        scores, tops = (np.array([pair[i] for pair in pairs]) for i in (0, 1))
        r2, rho = agreement(scores, tops)
        over = f"{checkpoint}, over {len(pairs)} datasets"
        said = f"R² {r2:.3f}, Spearman's rho {rho:.3f}" if len(pairs) > 2 else "too few to tell"
        notes.append(element("p", f"{over}: {said}."))
    header = ("checkpoint", "dataset", "MaNo score", "top-1 accuracy, %")
    said = "A score of unlabelled images that should rise and fall with the accuracy on them."
    caption = "MaNo's score against the accuracy that it did not see"
    return [
        element("h3", "MaNo"),
        element("p", said),
        table(header, cells, caption=caption),
        *notes,
    ]


def _paired(scorecard: Scorecard) -> list[Html]:
    """Every checkpoint against the first, where predictions of both are there."""
    names = list(dict.fromkeys(p.checkpoint for p in scorecard.predictions))
    if len(names) < 2:
        return []
    ordered = [r.checkpoint for r in scorecard.results if r.checkpoint in names]
    first = ordered[0] if ordered else names[0]
    parts = []
    for name in names:
        if name in (first, BASELINE):
            continue
        found = compare(scorecard.predictions, first, name)
        cells = [_paired_row(one) for one in found]
        header = ("dataset", "method", "metric", "difference", "95 % interval", "p", "n")
        caption = f"{name} less {first}"
        parts.append(table(header, cells, caption=caption))
    said = "Differences by paired bootstrap: both checkpoints see the same resampled images."
    return [element("h3", "Paired differences"), element("p", said), *parts]


def _paired_row(one: Comparison) -> tuple[object, ...]:
    low, high = one.interval
    clear = low > 0 or high < 0
    text = f"{100 * one.difference:+.2f} points"
    shots = f", {one.shots} shots" if one.shots is not None else ""
    return (
        one.dataset,
        f"{one.method}{shots}",
        one.metric,
        element("strong", text) if clear else text,
        f"{100 * low:+.2f} to {100 * high:+.2f}",
        f"{one.p:.3f}",
        f"{one.n:,}",
    )


def _details(shown: Sequence[dict[str, Any]]) -> list[Html]:
    parts: list[Html] = []
    for detail in shown:
        title = f"{detail['dataset']}, {detail['checkpoint']}"
        if "confusion" in detail:
            parts.append(
                details(f"Classes of {title}, {detail['method']}", *_confusion(detail["confusion"]))
            )
        if "roc" in detail:
            parts.append(details(f"{detail['method']}: ROC of {title}", _roc(title, detail["roc"])))
        if "risk_coverage" in detail:
            curves = [
                Series(name, [(100 * c, 100 * r) for c, r in points])
                for name, points in detail["risk_coverage"].items()
            ]
            x, y = Axis("coverage, %"), Axis("risk: wrong among them, %", starts_at_zero=True)
            chart = line_chart("Risk over coverage", curves, x, y)
            parts.append(details(f"Selective classification of {title}", _framed(chart)))
        if "reliability" in detail:
            points = [
                (100 * confidence, 100 * right) for confidence, right, _ in detail["reliability"]
            ]
            curves = [
                Series("measured", points),
                Series("calibrated", [(0.0, 0.0), (100.0, 100.0)]),
            ]
            x, y = Axis("confidence, %", starts_at_zero=True), Axis("right, %", starts_at_zero=True)
            chart = line_chart("Reliability", curves, x, y)
            parts.append(details(f"Calibration of {title}", _framed(chart)))
        if "groups" in detail:
            bars = _bars([(name, value, n) for name, value, n in detail["groups"]])
            parts.append(details(f"Groups of {title}", bars))
    return [element("h3", "In detail"), *parts] if parts else []


def _framed(chart: Html) -> Html:
    return element("div", chart, class_="charts")


def _roc(title: str, curves: dict[str, Sequence[tuple[float, float]]]) -> Html:
    names = list(curves)
    charts = []
    for start in range(0, len(names), 6):  # as many as there are line styles
        series = [
            Series(name, [(100 * a, 100 * b) for a, b in curves[name]])
            for name in names[start : start + 6]
        ]
        x = Axis("OOD taken for ID, %", starts_at_zero=True)
        y = Axis("ID recognized, %", starts_at_zero=True)
        charts.append(line_chart(f"ROC, {title}", series, x, y))
    return element("div", *charts, class_="charts")


def _confusion(confusion: dict[str, Any]) -> list[Html]:
    per_class = sorted(confusion["per_class"], key=lambda row: (-row[1] / row[2], row[0]))
    rows = [(name, right / size, size) for name, right, size in per_class]
    few = rows if len(rows) <= MAX_CLASSES else [*rows[:60], *rows[-60:]]
    more = f" (the best and the worst 60 of {len(rows)})" if len(rows) > len(few) else ""
    parts = [element("h4", f"Recall of each class{more}"), _bars(few)]
    if confusion["confused"]:
        cells = [(true, guess, f"{count:,}") for true, guess, count in confusion["confused"]]
        parts.append(table(("class", "taken for", "images"), cells, caption="Most often confused"))
    if "matrix" in confusion:
        parts.append(_matrix(**confusion["matrix"]))
    return parts


def _bars(rows: Sequence[tuple[str, float, int]]) -> Html:
    items = [
        element(
            "li",
            element("bdi", name, title=name),
            element(
                "span",
                element("span", class_="fill", style=f"width:{100 * value:.1f}%"),
                class_="track",
            ),
            element("small", f"{100 * value:.0f} % of {n:,}"),
        )
        for name, value, n in rows
    ]
    return element("ul", *items, class_="bars")


def _matrix(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Html:
    """Return the confusion matrix as a picture: a row a class, a column what it is taken for."""
    left, top = 170, 16
    width = left + _SIDE * len(classes) + 4
    height = top + _SIDE * len(classes) + 4
    parts = [element("text", "taken for (same order)", x=left, y=10)]
    for i, (name, row) in enumerate(zip(classes, counts, strict=True)):
        y = top + _SIDE * i
        label = name if len(name) <= 18 else f"{name[:17]}…"
        parts.append(element("text", label, x=left - 5, y=y + 11, text_anchor="end"))
        total = sum(row) or 1
        for j, count in enumerate(row):
            if not count:
                continue
            said = f"{name} taken for {classes[j]}: {count:,} of {total:,}"
            cell = element(
                "rect",
                x=left + _SIDE * j,
                y=y,
                width=_SIDE - 1,
                height=_SIDE - 1,
                opacity=round(0.08 + 0.92 * count / total, 3),
                class_="cell",
            )
            parts.append(element("g", element("title", said), cell))
    svg = element(
        "svg",
        *parts,
        viewBox=f"0 0 {width} {height}",
        width=width,
        role="img",
        aria_label="confusion matrix",
        class_="chart",
        style=f"max-width:{width}px",
    )
    return element("figure", element("figcaption", "Confusion matrix (rows sum to one)"), svg)
