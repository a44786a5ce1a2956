"""The section on results: each metric with its interval, chance and baseline; examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from evaluation.result import BASELINE, Result, is_fraction
from tools.report.charts import interval_strip
from tools.report.comparison import comparison_parts
from tools.report.html import Html, details, element, join, table
from tools.report.pictures import decoded_png
from tools.report.sources import Examples, ImageQuery, Scorecard, ShownImage, TextQuery

_METHODS = {"zero_shot": "zero-shot classification", "retrieval": "retrieval"}
_OOD = "ood/"
_BASELINE_LABEL = "nearest training picture's caption"
_METRICS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "mean_per_class_recall": "mean per-class recall",
    "f1_macro": "macro F1",
}


def metric_label(metric: str) -> str:
    """Return a metric's name for people: "text to image R@10"."""
    if metric in _METRICS:
        return _METRICS[metric]
    direction, _, rank = metric.partition("_recall@")
    words = {"t2i": "text to image", "i2t": "image to text", "mean": "mean of both,"}
    return f"{words[direction]} R@{rank}" if direction in words and rank else metric


def percent(fraction: float) -> str:
    """Write a fraction as per cent: one decimal, or two significant digits below 1 %."""
    is_small = 0 < fraction < 0.01
    return f"{100 * fraction:.2g}\u00a0%" if is_small else f"{100 * fraction:.1f}\u00a0%"


def scorecard_section(scorecard: Scorecard) -> Html:
    """Return the section of results and examples."""
    return element(
        "section",
        element("h2", "Scorecard"),
        element(
            "p",
            "Each value with its 95 % bootstrap interval. In the strip: ",
            element("span", "● value and interval", class_="key-value"),
            ", ",
            element("span", "┆ chance", class_="key-m0"),
            ", ",
            element("span", f"│ {_BASELINE_LABEL}", class_="key-m1"),
            " (what pixels alone give: the most similar training picture answers, no model).",
        ),
        *_result_tables(scorecard.results),
        *comparison_parts(scorecard),
        element("h3", "Example retrievals") if scorecard.examples else None,
        element("p", "Queries are chosen by hash, not by hand.") if scorecard.examples else None,
        *(_examples(e, is_open=number == 0) for number, e in enumerate(scorecard.examples)),
    )


def _result_tables(results: Sequence[Result]) -> list[Html]:
    """Return a table a dataset and method; few-shot results are curves (comparison.py)."""

    def place(row: Result) -> tuple[str, str, str]:
        return row.dataset, row.method, row.compat

    plain = [row for row in results if row.shots is None or row.method == "base_to_new"]
    tables = []
    for (dataset, method, compat), group in groupby(sorted(plain, key=place), key=place):
        rows = list(group)
        if method.startswith(_OOD):
            tables += _detection_tables(dataset, method.removeprefix(_OOD), rows)
            continue
        baseline = {row.metric: row for row in rows if row.checkpoint == BASELINE}
        models = [row for row in rows if row.checkpoint != BASELINE] or rows
        metrics = list(dict.fromkeys(row.metric for row in models))  # checkpoints side by side
        models.sort(key=lambda row: (metrics.index(row.metric), row.checkpoint))
        mark = " (the authors' protocol, which may look at test data)"
        caption = (
            f"{dataset}: {_METHODS.get(method, method)}{mark if compat == 'published' else ''}"
        )
        header = (
            *("metric", "checkpoint", "value", "95 % interval", "0 to 100 %", "chance"),
            *((_BASELINE_LABEL,) if baseline else ()),
            "n",
        )
        cells = [_result_row(row, baseline) for row in models]
        tables.append(table(header, cells, caption=caption))
    return tables


def _detection_tables(dataset: str, other: str, rows: Sequence[Result]) -> list[Html]:
    """Return a table a checkpoint: a row a score, best AUROC first."""
    measures = {"auroc": "AUROC", "aupr": "AUPR", "fpr95": "FPR95"}
    tables = []
    for checkpoint in sorted({row.checkpoint for row in rows}):
        found = {
            tuple(row.metric.rsplit("_", 1)): row for row in rows if row.checkpoint == checkpoint
        }
        scores = sorted({name for name, _ in found}, key=lambda s: -found[s, "auroc"].value)
        cells = [(score, *(_with_interval(found[score, m]) for m in measures)) for score in scores]
        first = found[scores[0], "auroc"]
        caption = f"{dataset} (in distribution) against {other}, {checkpoint}: n = {first.n:,}"
        tables.append(table(("score", *measures.values()), cells, caption=caption))
    return tables


def _with_interval(row: Result) -> Html:
    said = row.metric_definition
    ends = map(percent, row.interval or ())
    interval = element("span", f"({' to '.join(ends)})", class_="range") if row.interval else ""
    return element("span", element("strong", percent(row.value)), " ", interval, title=said)


def _result_row(row: Result, baselines: Mapping[str, Result]) -> tuple[object, ...]:
    baseline = baselines.get(row.metric)
    marks = {"chance": row.chance} if row.chance is not None else {}
    if baseline is not None:
        marks[_BASELINE_LABEL] = baseline.value
    strip: object = ""
    if row.interval is not None and is_fraction(row.metric):
        strip = interval_strip(row.value, *row.interval, marks)
    beside: tuple[object, ...] = ()
    if baselines:
        beside = (value_text(row, baseline.value) if baseline is not None else "not run",)
    return (
        element("span", metric_label(row.metric), title=row.metric_definition),
        element("bdi", row.checkpoint),
        element("strong", value_text(row, row.value)),
        "-"
        if row.interval is None
        else element(
            "span", " to ".join(value_text(row, end) for end in row.interval), class_="range"
        ),
        strip,
        "-" if row.chance is None else value_text(row, row.chance),
        *beside,
        f"{row.n:,}",
    )


def value_text(row: Result, number: float) -> str:
    """Write a number of a row: a fraction as per cent, anything else as it is."""
    return percent(number) if is_fraction(row.metric) else f"{number:.4g}"


def _examples(examples: Examples, *, is_open: bool) -> Html:
    title = f"{examples.dataset}, {examples.checkpoint}"
    return details(
        title,
        element("h4", "A text and the five pictures nearest to it"),
        *map(_text_query, examples.text_to_image),
        element("h4", "A picture and the five texts nearest to it"),
        element("div", *map(_image_query, examples.image_to_text), class_="queries"),
        is_open=is_open,
    )


def _picture(image: ShownImage, alt: str) -> Html:
    uri = decoded_png(image.png)
    if uri is None:
        return element("div", "picture not readable", class_="missing")
    return element("img", src=uri, alt=alt, decoding="async")


def _mark(right: bool) -> Html:
    return element("span", "✓ right" if right else "✗", class_="yes" if right else "no")


def _text_query(query: TextQuery) -> Html:
    found = [
        element(
            "li",
            element("div", _picture(image, f"retrieved picture {rank}"), class_="frame"),
            element("small", _mark(image.right), f" {image.score:.2f}"),
            class_="right" if image.right else None,
        )
        for rank, image in enumerate(query.images, start=1)
    ]
    return element(
        "div",
        element("p", query.text, dir="auto", class_="query"),
        element("ol", *found, class_="found"),
        class_="text-query",
    )


def _image_query(query: ImageQuery) -> Html:
    own = "; ".join(query.own_texts) or "(no text)"
    found = [
        element(
            "li",
            _mark(answer.right),
            " ",
            element("bdi", answer.text),
            " ",
            element("small", f"{answer.score:.2f}"),
        )
        for answer in query.texts
    ]
    return element(
        "div",
        element("div", _picture(query.image, f"query picture: {own}"), class_="frame"),
        element("div", element("p", own, dir="auto", class_="query"), element("ol", join(found))),
        class_="image-query",
    )
