"""A map of where a model puts the images of a probe set, over training (evaluation/probe.py).

Principal components of the last evaluation's embeddings, centred; the earlier ones are projected on
the same two axes, so that a point that moves has moved. Two axes show a part of the variance, which
is written beside each map. (UMAP would show neighbours better, and no distances; its place changes
with a seed, so that a map of today could not be laid on that of yesterday.)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tools.report.html import Html, element, join
from tools.report.runs import Probe, Run

MAX_MAPS = 6
NUM_COLOURS = 5  # classes with a colour of their own; the others are grey
_SIDE, _EDGE = 300, 8
Array = npt.NDArray[np.float64]


def map_parts(names: Sequence[str], runs: Sequence[Run]) -> list[Html]:
    """Return the maps of all runs; nothing where no probe set was embedded."""
    parts = [
        _maps(f"{probe.dataset}, {name}" if len(runs) > 1 else probe.dataset, probe)
        for name, run in zip(names, runs, strict=True)
        for probe in run.probes
    ]
    if not parts:
        return []
    said = (
        "Each point is a test image where the model puts it, on the two principal axes of the last "
        "map: a point that moves from map to map has moved. Under the pointer: what it shows."
    )
    return [element("h3", "Map of the probe set"), element("p", said), *parts]


def principal_axes(embedded_nD: Array) -> tuple[Array, Array]:
    """Return the mean [D] and the two axes [2, D] of the most variance; signs are fixed."""
    mean_D = embedded_nD.mean(axis=0)
    _, _, axes_kD = np.linalg.svd(embedded_nD - mean_D, full_matrices=False)
    axes_2D = np.zeros((2, embedded_nD.shape[1]))
    axes_2D[: min(2, len(axes_kD))] = axes_kD[:2]
    for axis_D in axes_2D:
        if axis_D[np.argmax(np.abs(axis_D))] < 0:
            axis_D *= -1
    return mean_D, axes_2D


def share_shown(embedded_nD: Array, axes_2D: Array) -> float:
    """Return the share of the variance that lies along the axes."""
    centred_nD = embedded_nD - embedded_nD.mean(axis=0)
    total = float((centred_nD**2).sum())
    return float(((centred_nD @ axes_2D.T) ** 2).sum()) / total if total else 0.0


def chosen(number: int) -> list[int]:
    """Return which of `number` evaluations are drawn: evenly spaced, the first and the last."""
    return sorted({round(i) for i in np.linspace(0, number - 1, min(number, MAX_MAPS))})


def _maps(title: str, probe: Probe) -> Html:
    steps = [probe.steps[i] for i in chosen(len(probe.steps))]
    mean_D, axes_2D = principal_axes(probe.steps[-1].embedded_pD)
    placed = [(step.embedded_pD - mean_D) @ axes_2D.T for step in steps]
    bounds = _bounds(np.concatenate(placed))
    counts = Counter(probe.labels)
    coloured = [label for label, n in sorted(counts.items(), key=lambda c: (-c[1], c[0])) if n > 1]
    style = {label: number + 1 for number, label in enumerate(coloured[:NUM_COLOURS])}
    figures = []
    for step, place_p2 in zip(steps, placed, strict=True):
        share = share_shown(step.embedded_pD, axes_2D)
        said = f"{step.samples_seen:,} samples"
        note = element("small", f"the axes show {100 * share:.0f}\u00a0% of the variance")
        svg = _map(f"{title} at {said}", probe.labels, place_p2, bounds, style)
        figures.append(element("figure", element("figcaption", said), svg, note, class_="plot"))
    keys = [element("span", _swatch(number), " ", element("bdi", label), class_="key")
            for label, number in style.items()]  # fmt: skip
    if len(counts) > len(style):
        keys.append(element("span", _swatch(0), " others", class_="key"))
    return join(
        [
            element("h4", f"{title}: {len(probe.labels):,} images"),
            element("p", join(keys), class_="legend") if style else None,
            element("div", *figures, class_="maps"),
        ]
    )


def _bounds(places_n2: Array) -> tuple[Array, float]:
    """Return the lower corner and the side of the square that holds every point."""
    low_2, high_2 = places_n2.min(axis=0), places_n2.max(axis=0)
    side = float((high_2 - low_2).max()) or 1.0
    return (low_2 + high_2 - side) / 2, side


def _map(
    title: str,
    labels: Sequence[str],
    place_p2: Array,
    bounds: tuple[Array, float],
    style: dict[str, int],
) -> Html:
    low_2, side = bounds
    scaled = _EDGE + (place_p2 - low_2) / side * (_SIDE - 2 * _EDGE)
    order = sorted(range(len(labels)), key=lambda i: style.get(labels[i], 0))  # grey below
    dots = [
        element(
            "circle",
            element("title", labels[i]),
            cx=round(float(scaled[i, 0]), 1),
            cy=round(_SIDE - float(scaled[i, 1]), 1),
            r=3,
            class_=f"place s{style.get(labels[i], 0)}",
        )
        for i in order
        if math.isfinite(scaled[i].sum())
    ]
    frame = element("rect", x=0.5, y=0.5, width=_SIDE - 1, height=_SIDE - 1, class_="frame-line")
    box = f"0 0 {_SIDE} {_SIDE}"
    return element("svg", frame, *dots, viewBox=box, role="img", aria_label=title, class_="chart")


def _swatch(number: int) -> Html:
    dot = element("circle", cx=6, cy=6, r=4, class_=f"place s{number}")
    return element("svg", dot, viewBox="0 0 12 12", width=12, height=12, aria_hidden="true")
