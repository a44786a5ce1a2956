"""The section on pretraining runs: loss, throughput and what else was logged, over samples seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from configs.progress import format_duration
from tools.report.charts import Axis, Series, line_chart
from tools.report.html import Html, details, element, table
from tools.report.sources import Run

_SAMPLES = Axis("samples seen")


@dataclass(frozen=True)
class _Curve:
    metric: str
    title: str
    axis: Axis


_CURVES = (
    _Curve("loss", "Loss", Axis("loss")),
    _Curve("samples_per_second", "Throughput", Axis("samples/s", starts_at_zero=True)),
    _Curve(
        "accuracy_i2t", "Accuracy within the batch", Axis("fraction right", starts_at_zero=True)
    ),
    _Curve("data_wait_fraction", "Waiting for data", Axis("fraction", starts_at_zero=True)),
    _Curve("gradient_norm", "Gradient norm", Axis("norm", starts_at_zero=True)),
    _Curve("learning_rate", "Learning rate", Axis("rate", starts_at_zero=True)),
)


def training_section(runs: Sequence[Run]) -> Html:
    """Return the section of all runs, each a line in every chart."""
    names = run_names(runs)
    charts = []
    for curve in _CURVES:
        series = [
            Series(name, _points(run, curve.metric)) for name, run in zip(names, runs, strict=True)
        ]
        if any(s.points for s in series):
            charts.append(line_chart(curve.title, series, _SAMPLES, curve.axis))
    configs = [
        details(f"Configuration of {name}", element("pre", run.config))
        for name, run in zip(names, runs, strict=True)
        if run.config
    ]
    return element(
        "section",
        element("h2", "Pretraining"),
        _summary(names, runs),
        element("div", *charts, class_="charts"),
        *configs,
    )


def run_names(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run: its folder's, with the parent's where that is not enough."""
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = ["/".join(run.folder.resolve().parts[-2:]) for run in runs]
    return names


def _points(run: Run, metric: str) -> list[tuple[float, float]]:
    return [(row["samples_seen"], row[metric]) for row in run.rows if metric in row]


def _summary(names: Sequence[str], runs: Sequence[Run]) -> Html:
    rows = []
    for name, run in zip(names, runs, strict=True):
        if not run.rows:
            rows.append((name, "no step logged yet", "", "", "", "", ""))
            continue
        last = run.rows[-1]
        rates = sorted(v for _, v in _points(run, "samples_per_second"))
        peak = max((v for _, v in _points(run, "peak_memory_bytes")), default=0.0)
        skipped = int(last.get("skipped_samples", 0))
        note = f"{skipped:,}"
        if run.num_broken_lines:
            note += f" (and {run.num_broken_lines:,} lines of metrics.jsonl cannot be read)"
        rows.append(
            (
                name,
                f"{last['samples_seen']:,.0f}",
                f"{last['loss']:.3f}" if "loss" in last else "",
                f"{rates[len(rates) // 2]:,.0f}" if rates else "",
                f"{peak / 2**30:.2f}" if peak else "",
                format_duration(sum(v for _, v in _points(run, "seconds"))),
                note,
            )
        )
    header = (
        *("run", "samples seen", "last loss", "samples/s (median)"),
        *("peak memory, GiB", "time in logged steps", "bad samples replaced"),
    )
    return table(header, rows, caption="Runs")
