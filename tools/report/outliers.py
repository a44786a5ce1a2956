"""Pictures of the samples that stand at the far end of what a rule measured."""

from __future__ import annotations

from collections.abc import Callable

from tools.report.html import Html, details, element
from tools.report.sources import CurationReport, SampleReference


def outlier_parts(report: CurationReport, card: Callable[[SampleReference], Html]) -> list[Html]:
    """Return a sheet for each value that a rule measured; `card` draws a sample."""
    parts = []
    for column, found in report.outliers.items():
        cards = [
            element(
                "div",
                card(sample),
                element("p", f"{sample.value:.4g}, ", element("bdi", sample.outcome)),
                class_="group",
            )
            for sample in found.samples
        ]
        if cards:
            title = f"{column}: the {len(cards)} {found.end}"
            parts.append(details(title, element("div", *cards, class_="groups"), is_open=True))
    return [element("h3", "Outliers"), *parts] if parts else []
