"""Read a pretraining run: its log, its starts, and where its probe set lay (docs/formats.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import DataError
from tools.report.sources import RUN_FILE, text_of

STARTS_FILE, PROBE_FOLDER, PROBE_IMAGES = "starts.jsonl", "probe", "images.json"


@dataclass(frozen=True)
class Start:
    """A process that trained: from where, why, on how many ranks, when (UTC)."""

    samples_seen: int
    reason: str
    ranks: int
    time: str


@dataclass(frozen=True)
class ProbeStep:
    """Where the probe set lay at one evaluation: [P, D]."""

    samples_seen: int
    embedded_pD: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Probe:
    """The probe set of one dataset over training; what each image shows."""

    dataset: str
    labels: Sequence[str]
    steps: Sequence[ProbeStep]


@dataclass(frozen=True)
class Run:
    """A pretraining run: one row of numbers a logged step."""

    folder: Path
    rows: Sequence[dict[str, float]]
    num_broken_lines: int
    config: str | None
    starts: Sequence[Start] = ()
    probes: Sequence[Probe] = ()


def read_run(folder: Path) -> Run:
    """Read a run; lines of its log that a kill cut are counted, not read.

    Raises DataError where another of its files is not what it should be.
    """
    rows, num_broken = [], 0
    for line in _lines(folder / RUN_FILE):
        try:
            content = json.loads(line)
            row = {key: float(v) for key, v in content.items() if isinstance(v, int | float)}
            if not math.isfinite(row["samples_seen"]):
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            num_broken += 1
        else:
            rows.append(row)
    config = text_of(folder / "config.yaml")
    return Run(folder, rows, num_broken, config, _starts(folder / STARTS_FILE), _probes(folder))


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    return text.removesuffix("\n").split("\n") if text else []


def _starts(path: Path) -> list[Start]:
    if not path.is_file():  # a run of an earlier version
        return []
    found = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            row: dict[str, Any] = json.loads(line)
            samples, ranks = int(row["samples_seen"]), int(row["ranks"])
            found.append(Start(samples, str(row["reason"]), ranks, str(row["time"])))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DataError(
                f"{path}, line {number}: expected {{samples_seen, reason, ranks, time}}, got "
                f"{line[:80]!r}. Remove the line: it is history, nothing else reads it."
            ) from None
    return found


def _probes(folder: Path) -> list[Probe]:
    found = []
    for path in sorted((folder / PROBE_FOLDER).glob(f"*/{PROBE_IMAGES}")):
        try:
            labels = [str(label) for label in json.loads(path.read_text("utf-8"))["labels"]]
            steps = [_probe_step(step, len(labels)) for step in sorted(path.parent.glob("*.npy"))]
        except (ValueError, KeyError, TypeError, OSError, EOFError, RecursionError) as error:
            raise DataError(
                f"{path.parent} is not a probe set of this version ({error}). Expected "
                f"{PROBE_IMAGES} and samples-*.npy with a row an image; move the folder away to "
                "report without it."
            ) from None
        if steps and len(labels) > 2:
            found.append(Probe(path.parent.name, labels, steps))
    return found


def _probe_step(path: Path, num_images: int) -> ProbeStep:
    embedded = np.load(path, allow_pickle=False)
    if embedded.ndim != 2 or len(embedded) != num_images or embedded.dtype.kind != "f":
        raise ValueError(f"{path.name} is {embedded.dtype} {embedded.shape}, not {num_images} rows")
    embedded_pD = np.nan_to_num(embedded.astype(np.float64), posinf=0.0, neginf=0.0)
    return ProbeStep(int(path.stem.removeprefix("samples-")), embedded_pD)
