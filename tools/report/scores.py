"""Rules that judge by a number: how the values lie, where the rule cuts, who is at both ends."""

from __future__ import annotations

from collections.abc import Callable

from tools.report.charts import histogram
from tools.report.html import Html, details, element
from tools.report.sources import CurationReport, RuleScores, SampleReference, ScoredSample

Card = Callable[[SampleReference], Html]


def score_parts(report: CurationReport, card: Card) -> list[Html]:
    """Return a histogram a rule with its limits, and contact sheets of both ends."""
    parts = []
    for label, found in report.scores.items():
        if found.num_scored:
            parts += [element("div", _histogram(label, found), class_="charts")]
            ends = (("highest", found.highest), ("lowest", found.lowest))
            parts += [
                details(f"{label}: {what} {found.column}", _sheet(samples, card))
                for what, samples in ends
                if found.column != "poison"  # whose outliers have a section of their own
            ]
    return [element("h3", "Scores and where the rules cut"), *parts] if parts else []


def _histogram(label: str, found: RuleScores) -> Html:
    bins, limits = found.histogram, {}
    said = f"{label}: {found.num_left:,} of {found.num_scored:,} left"
    left, gone = found.left, found.dropped
    if left:
        said += f", from {left[0]:.4g} to {left[1]:.4g}"
        if gone and gone[0] < left[0]:
            limits[f"the least that stays: {left[0]:.6g}"] = left[0]
        if gone and gone[1] > left[1]:
            limits[f"the most that stays: {left[1]:.6g}"] = left[1]
    return histogram(said, bins.edges, bins.before, bins.after, found.column, limits)


def _sheet(samples: list[ScoredSample], card: Card) -> Html:
    figures = [
        element(
            "div",
            card(sample),
            element("small", f"{sample.value:.4g}, ", element("bdi", sample.outcome)),
        )
        for sample in samples
    ]
    return element("div", *figures, class_="sheet")
