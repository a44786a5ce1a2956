"""The section on pretraining runs: what was logged over samples seen, and what happened on the way.

Marked: where stages begin, restarts, steps that were skipped, returns to a checkpoint; rings where
the gradient norm was clipped. maps.py has the map of the probe set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from configs.progress import format_duration
from tools.report.charts import Axis, Mark, Series, line_chart
from tools.report.html import Html, details, element, table
from tools.report.maps import map_parts
from tools.report.runs import Run
from tools.report.side_by_side import config_differences

_SAMPLES = Axis("samples seen")
_GIB = 2**30
_IN_TRAINING = "evaluation/"
_JUDGED = {  # metric -> what it is called
    "top1": "Zero-shot top-1 accuracy while training",
    "t2i_recall@1": "Text to image R@1 while training",
    "i2t_recall@1": "Image to text R@1 while training",
}


@dataclass(frozen=True)
class _Curve:
    metric: str
    title: str
    axis: Axis
    unit: float = 1.0  # what one of the axis is in the log's unit


_PERCENT = 0.01


def _from_zero(title: str) -> Axis:
    return Axis(title, starts_at_zero=True)


_CURVES = (
    _Curve("loss", "Loss", Axis("loss, nats")),
    _Curve("accuracy_i2t", "Accuracy within the batch", _from_zero("right, %"), _PERCENT),
    _Curve("samples_per_second", "Throughput", _from_zero("samples/s")),
    _Curve("data_wait_fraction", "Waiting for data", _from_zero("of the time, %"), _PERCENT),
    _Curve("gradient_norm", "Gradient norm, before clipping", _from_zero("norm")),
    _Curve("learning_rate", "Learning rate", _from_zero("rate")),
    _Curve("logit_scale", "Logit scale", Axis("scale")),
    _Curve("peak_memory_bytes", "Peak memory of rank 0", _from_zero("GiB"), _GIB),
    _Curve("mfu", "Model FLOPs utilization", _from_zero("of the peak, %"), _PERCENT),
)


def training_section(runs: Sequence[Run]) -> Html:
    """Return the section of all runs, each a line in every chart."""
    names = run_names(runs)
    marks = [mark for name, run in zip(names, runs, strict=True) for mark in _marks(name, run)]
    charts = []
    for curve in _CURVES:
        series = [_series(name, run, curve) for name, run in zip(names, runs, strict=True)]
        if any(s.points for s in series):
            charts.append(line_chart(curve.title, series, _SAMPLES, curve.axis, marks))
    charts += _judged(names, runs)
    configs = [
        details(f"Configuration of {name}", element("pre", run.config))
        for name, run in zip(names, runs, strict=True)
        if run.config
    ]
    return element(
        "section",
        element("h2", "Pretraining"),
        _summary(names, runs),
        config_differences(names, [run.config for run in runs]),
        element("div", *charts, class_="charts"),
        *map_parts(names, runs),
        *configs,
    )


def run_names(runs: Sequence[Run]) -> list[str]:
    """Return a name for each run: its folder's, with the parent's where that is not enough."""
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = ["/".join(run.folder.resolve().parts[-2:]) for run in runs]
    return names


def _points(run: Run, metric: str, unit: float = 1.0) -> list[tuple[float, float]]:
    return [(row["samples_seen"], row[metric] / unit) for row in run.rows if metric in row]


def _series(name: str, run: Run, curve: _Curve) -> Series:
    flagged = {}
    if curve.metric == "gradient_norm":
        for row in run.rows:
            if row.get("clip_rate", 0) > 0 and "gradient_norm" in row:
                flagged[row["samples_seen"], row["gradient_norm"]] = "clipped since the row before"
    return Series(name, _points(run, curve.metric, curve.unit), flagged=flagged)


def _marks(name: str, run: Run) -> list[Mark]:
    """Return what happened on the way, from the log and from starts.jsonl."""
    marks = []
    trained = [row for row in run.rows if "evaluation_seconds" not in row]
    for before, row in pairwise(trained):
        at = row["samples_seen"]
        if row.get("stage", 0) > before.get("stage", 0):
            begins = before["samples_seen"]
            marks.append(Mark(begins, "stage", f"{name}: stage {row['stage']:.0f} begins"))
        skipped = row.get("skipped_steps", 0) - before.get("skipped_steps", 0)
        if skipped > 0:
            said = f"{name}: {skipped:,.0f} steps skipped before {at:,.0f} samples: not finite"
            marks.append(Mark(at, "skipped", said))
    for start in run.starts[1:]:
        kind = "back" if start.reason == "went back" else "restart"
        said = f"{name}: {start.reason} at {start.samples_seen:,} samples, {start.ranks} ranks"
        marks.append(Mark(start.samples_seen, kind, f"{said}, {start.time}"))
    return marks


def _judged(names: Sequence[str], runs: Sequence[Run]) -> list[Html]:
    """Return a chart a metric of the evaluations while training: a line a run and dataset."""
    charts = []
    for metric, title in _JUDGED.items():
        series = []
        for name, run in zip(names, runs, strict=True):
            keys = {key for row in run.rows for key in row if key.startswith(_IN_TRAINING)}
            for key in sorted(key for key in keys if key.endswith(f"/{metric}")):
                dataset = key.removeprefix(_IN_TRAINING).removesuffix(f"/{metric}")
                label = f"{name}: {dataset}" if len(runs) > 1 else dataset
                series.append(Series(label, _points(run, key, _PERCENT)))
        if series:
            axis = _from_zero("of the test images, %")
            charts.append(line_chart(title, series, _SAMPLES, axis))
    return charts


def _summary(names: Sequence[str], runs: Sequence[Run]) -> Html:
    rows = []
    for name, run in zip(names, runs, strict=True):
        trained = [row for row in run.rows if "evaluation_seconds" not in row]
        if not trained:
            rows.append((name, "no step logged yet", "", "", "", "", "", ""))
            continue
        last = trained[-1]
        rates = sorted(v for _, v in _points(run, "samples_per_second"))
        peak = max((v for _, v in _points(run, "peak_memory_bytes")), default=0.0)
        note = f"{int(last.get('skipped_samples', 0)):,}"
        if run.num_broken_lines:
            note += f" (and {run.num_broken_lines:,} lines of metrics.jsonl cannot be read)"
        rows.append(
            (
                name,
                f"{last['samples_seen']:,.0f}",
                f"{last['loss']:.3f}" if "loss" in last else "",
                f"{rates[len(rates) // 2]:,.0f}" if rates else "",
                f"{peak / _GIB:.2f}" if peak else "",
                format_duration(sum(v for _, v in _points(run, "seconds"))),
                f"{max(0, len(run.starts) - 1):,}",
                note,
            )
        )
    header = (
        *("run", "samples seen", "last loss", "samples/s (median)", "peak memory, GiB"),
        *("time in logged steps", "restarts", "bad samples replaced"),
    )
    return table(header, rows, caption="Runs")
