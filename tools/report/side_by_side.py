"""What several datasets or runs differ in: their numbers, their configurations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from configs.errors import DataError
from tools.report.html import Html, element, table
from tools.report.sources import CurationReport, Dataset

_NOTHING = "-"
_OWN_KEYS = ("output", "name")  # differ between any two


def config_differences(names: Sequence[str], configs: Sequence[str | None]) -> Html | None:
    """Return a row for every key whose value is not the same in all configurations."""
    trees = [_flat(_tree(name, text)) for name, text in zip(names, configs, strict=True) if text]
    if len(trees) < 2 or len(trees) < len(configs):
        return None
    keys = dict.fromkeys(key for tree in trees for key in tree)
    rows = [
        (key, *(element("bdi", tree.get(key, _NOTHING)) for tree in trees))
        for key in keys
        if key not in _OWN_KEYS and len({tree.get(key) for tree in trees}) > 1
    ]
    if not rows:
        return element("p", "Their configurations are the same, their names aside.")
    return table(("key", *names), rows, caption="What their configurations differ in")


def _tree(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(
            f"config.yaml of {name} is not valid YAML: {error}. Put it right, or move it away to "
            "report without it."
        ) from None


def _flat(tree: Any, path: str = "") -> dict[str, str]:
    """Return `key.path` -> value as YAML writes it; empty sections are values."""
    items: Any = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    found: dict[str, str] = {}
    for key, value in items:
        found |= _flat(value, f"{path}.{key}" if path else str(key))
    if not items and path:
        found[path] = "null" if tree is None else str(tree)
    return found


def datasets_section(datasets: Sequence[Dataset]) -> Html:
    """Return several datasets beside each other."""
    reports = [dataset.report for dataset in datasets]
    columns = [_numbers(report) for report in reports]
    rows = [
        (label, *(column.get(label, _NOTHING) for column in columns))
        for label in dict.fromkeys(label for column in columns for label in column)
    ]
    names = [report.name for report in reports]
    return element(
        "section",
        element("h2", "Datasets beside each other"),
        table(("", *names), rows, caption="What was kept, and how even it is"),
        config_differences(names, [dataset.config for dataset in datasets]),
    )


def _numbers(report: CurationReport) -> dict[str, str]:
    words = report.words
    found = {
        "samples read": f"{report.num_read:,}",
        "kept": f"{report.num_kept:,}",
        "of all": _percent(report.num_kept / report.num_read) if report.num_read else _NOTHING,
        "unreadable": f"{report.num_unreadable:,}",
        "words in the kept captions": f"{words.after.num_words:,}",
        "different words": f"{words.after.num_distinct:,}",
    }
    for name, histogram in report.histograms.items():
        label = f"median bin of {name.replace('_', ' ')}"
        found[label] = _median(histogram.edges, histogram.after)
    languages = {} if report.languages is None else dict(report.languages.after)
    total = sum(languages.values()) or 1
    languages.pop("unclear", None)
    if languages:
        code, count = max(languages.items(), key=lambda c: (c[1], c[0]))
        found["most frequent language"] = f"{code}, {_percent(count / total)}"
    if report.entries is not None:
        after = report.entries.after
        found |= {
            "entries matched": f"{after.num_matched:,}",
            "share of the matches: tail entries": _percent(after.tail_share),
            "Gini coefficient of the matches": f"{after.gini:.3f}",
        }
    return found


def _median(edges: Sequence[float], counts: Sequence[int]) -> str:
    total, seen = sum(counts), 0
    for i, count in enumerate(counts):
        seen += count
        if 2 * seen >= total > 0:
            end = f"to below {edges[i + 1]:,}" if i + 1 < len(edges) else "and above"
            return f"{edges[i]:,} {end}"
    return _NOTHING


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}\u00a0%"
