"""The page: what is found is read, each part gets its section, and one file is published.

Nothing on it needs a network or a second file. The content policy in its head forbids to load
anything, and every script but the one of the search box (search.js), which it names by digest,
whatever a caption says.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePath

from configs.publish import publish_text
from evaluation.result import BASELINE
from tools.report.curation import dataset_section
from tools.report.html import Html, element, join
from tools.report.runs import Run, read_run
from tools.report.scorecard import metric_label, percent, scorecard_section
from tools.report.side_by_side import datasets_section
from tools.report.sources import (
    Dataset,
    Scorecard,
    find,
    read_dataset,
    read_scorecard,
)
from tools.report.training import training_section

_STYLE = Path(__file__).with_name("page.css")
_SCRIPT = Path(__file__).with_name("search.js")
MAX_HEADLINES = 4


def report_on(folders: Sequence[Path], output: Path) -> Path:
    """Report on whatever `folders` (or the folders directly in them) hold; return `output`.

    Raises UsageError where there is nothing, DataError where a file is not what it should be.
    """
    datasets, runs, results = find(folders)
    title = ", ".join(folder.resolve().name for folder in folders)
    return build_report(datasets=datasets, runs=runs, results=results, output=output, title=title)


def build_report(
    *,
    datasets: Sequence[Path] = (),
    runs: Sequence[Path] = (),
    results: Sequence[Path] = (),
    output: Path,
    title: str,
) -> Path:
    """Publish the page on these folders at `output`; return it. Any of them may be empty.

    `datasets` hold report.json, `runs` metrics.jsonl, `results` results.jsonl and examples.json.
    """
    page = _page(
        title,
        [read_dataset(folder) for folder in datasets],
        [read_run(folder) for folder in runs],
        read_scorecard(results),
    )
    publish_text(output, page)
    return output


def _page(
    title: str, datasets: Sequence[Dataset], runs: Sequence[Run], scorecard: Scorecard
) -> Html:
    many = len(datasets) > 1
    sections = [datasets_section(datasets)] if many else []
    sections += [
        dataset_section(d, f"Dataset: {d.report.name}" if many else "Dataset") for d in datasets
    ]
    if runs:
        sections.append(training_section(runs))
    if scorecard.results:
        sections.append(scorecard_section(scorecard))
    script = _SCRIPT.read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title}: pairmill report"),
        element("style", Html(_STYLE.read_text(encoding="utf-8"))),
    )
    header = element(
        "header",
        element("h1", title),
        element("p", "pairmill report", class_="kind"),
        _headlines(datasets, runs, scorecard),
    )
    footer = element("footer", *(element("p", line) for line in _provenance(datasets, scorecard)))
    body = element(
        "body", header, element("main", *sections), footer, element("script", Html(script))
    )
    return join([Html("<!doctype html>\n"), element("html", head, body, lang="en"), Html("\n")])


def _policy(script: str) -> str:
    """Return the content policy: pictures and styles of the page itself, this one script."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    loads = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"{loads}; script-src 'sha256-{digest}'"


def _headlines(
    datasets: Sequence[Dataset], runs: Sequence[Run], scorecard: Scorecard
) -> Html | None:
    """Return the few numbers to be seen first."""
    cards: list[tuple[str, str]] = []
    for dataset in datasets[:1]:
        report = dataset.report
        who = f"{report.name}: " if len(datasets) > 1 else ""
        cards.append((f"{report.num_kept:,}", f"{who}samples kept of {report.num_read:,}"))
    for run in runs[:1]:
        trained = [row for row in run.rows if "loss" in row]
        if trained:
            last = trained[-1]
            who = f"{run.folder.name}: " if len(runs) > 1 else ""
            said = f"{who}loss after {last['samples_seen']:,.0f} samples"
            cards.append((f"{last['loss']:.2f}", said))
    first_metrics = {"zero_shot": "top1", "retrieval": "t2i_recall@10"}
    chosen = [
        row
        for row in scorecard.results
        if row.checkpoint != BASELINE and row.metric == first_metrics.get(row.method)
    ]
    for row in chosen[:MAX_HEADLINES]:
        who = (
            f"{PurePath(row.checkpoint).name}: " if len({r.checkpoint for r in chosen}) > 1 else ""
        )
        measured = f"{metric_label(row.metric)} on {row.dataset}"
        said = f"{who}{measured} (chance {percent(row.chance or 0)})"
        cards.append((percent(row.value), said))
    if not cards:
        return None
    items = [
        element("div", element("dd", number), element("dt", said), class_="headline")
        for number, said in cards
    ]
    return element("dl", *items, class_="headlines")


def _provenance(datasets: Sequence[Dataset], scorecard: Scorecard) -> list[str]:
    lines = [
        f"Dataset {d.report.name}: made by {d.report.created_by}, seed {d.report.seed}, "
        f"configuration sha256 {d.report.config_digest}."
        for d in datasets
    ]
    digests = {row.checkpoint: row.checkpoint_digest for row in scorecard.results}
    lines += [f"Weights of {name}: sha256 {digest}." for name, digest in sorted(digests.items())]
    return lines
