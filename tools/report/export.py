"""Results as a table for other tools: CSV with every field, Markdown for people.

In Markdown a row is a (dataset, method, metric) and a column a checkpoint.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from configs.errors import UsageError
from configs.publish import publish_text
from evaluation.result import Result, method_label, written


def export(results: Sequence[Result], path: Path) -> Path:
    """Write the results as .csv or .md; return the path."""
    forms = {".csv": to_csv, ".md": to_markdown}
    if path.suffix not in forms:
        raise UsageError(f"--export: got {path.name}; expected a name that ends with .csv or .md.")
    publish_text(path, forms[path.suffix](results))
    return path


def to_csv(results: Sequence[Result]) -> str:
    """Return one line a result, all its fields; lists and choices as JSON."""
    fields = [name for name in Result.model_fields if name != "interval"]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["metric_id", *fields, "low", "high"])
    for row in results:
        values = [getattr(row, name) for name in fields]
        cells = [json.dumps(v) if isinstance(v, dict | tuple) else v for v in values]
        writer.writerow([row.metric_id, *cells, *(row.interval or ("", ""))])
    return buffer.getvalue()


def to_markdown(results: Sequence[Result]) -> str:
    """Return a table: a line a (dataset, method, metric), a column a checkpoint."""
    checkpoints = list(dict.fromkeys(row.checkpoint for row in results))
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in results:
        text = written(row, row.value)
        if row.interval is not None:
            text += f" ({written(row, row.interval[0])} to {written(row, row.interval[1])})"
        key = (row.dataset, method_label(row), row.metric)
        lines.setdefault(key, {})[row.checkpoint] = text
    header = ["dataset", "method", "metric", *map(_cell, checkpoints)]
    table = [header, ["---"] * 3 + ["---:"] * len(checkpoints)]
    table += [
        [*map(_cell, key), *(found.get(name, "") for name in checkpoints)]
        for key, found in lines.items()
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
