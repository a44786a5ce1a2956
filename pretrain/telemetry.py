"""What a run says of itself: metrics.jsonl always, TensorBoard, W&B if asked, and a line for
people.

Rank 0 alone writes. The columns are in docs/formats.md. A resumed run first drops the rows after
its checkpoint, so that the log of a stopped and continued run is that of an uninterrupted one.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from configs.progress import format_duration
from configs.publish import publish_text
from pretrain.wandb_log import WandbLog

Row = Mapping[str, float]  # not finite: null in metrics.jsonl


def peak_memory_bytes() -> int:
    """Return the peak memory of this process: the device's where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def note_start(folder: Path, *, samples_seen: int, reason: str, num_ranks: int) -> None:
    """Append to starts.jsonl that training begins at `samples_seen` in this process.

    `reason`: start, resume, or went back (after steps that were not finite). It is what happened,
    not what the model saw: lines stay when a run goes back to an earlier checkpoint.
    """
    row = {
        "samples_seen": samples_seen,
        "reason": reason,
        "ranks": num_ranks,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    with open(folder / "starts.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


class Telemetry:
    """Appends one row a logged step."""

    def __init__(
        self,
        folder: Path,
        *,
        samples_seen: int,
        total_samples: int,
        wandb: WandbLog | None = None,
    ) -> None:
        self._total_samples = total_samples
        self._path = folder / "metrics.jsonl"
        self._drop_rows_after(samples_seen)
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (lives as long as the run)
        self._wandb = wandb
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=samples_seen + 1)

    def _drop_rows_after(self, samples_seen: int) -> None:
        if not self._path.exists():
            return
        lines = self._path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _samples_of(line) <= samples_seen]
        if len(kept) < len(lines):
            publish_text(self._path, "".join(f"{line}\n" for line in kept))

    def log(self, row: Row) -> None:
        """Write one row to every place."""
        self._write(row)
        print(self._line(row), file=sys.stderr, flush=True)

    def _write(self, row: Row) -> None:
        finite = {name: v if math.isfinite(v) else None for name, v in row.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(finite)
        for name, value in row.items():
            if name not in {"step", "samples_seen"}:
                self._board.add_scalar(name, value, int(row["samples_seen"]))

    def log_evaluation(
        self, step: int, samples_seen: int, found: Mapping[str, float], seconds: float
    ) -> None:
        """Write the numbers of an evaluation, `DATASET/METRIC` -> value, as a row of their own."""
        named = {f"evaluation/{name}": value for name, value in found.items()}
        row = {"step": step, "samples_seen": samples_seen, **named, "evaluation_seconds": seconds}
        self._write(row)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        print(f"evaluated at {samples_seen:,} samples in {seconds:.1f} s: {shown}", file=sys.stderr)

    def _line(self, row: Row) -> str:
        seen = int(row["samples_seen"])
        parts = [
            f"{seen:,}/{self._total_samples:,} samples ({seen / self._total_samples:.0%})",
            f"loss {row['loss']:.3f}",
            f"batch accuracy {row['accuracy_i2t']:.0%}",
            f"{row['samples_per_second']:,.0f} samples/s",
            f"data wait {row['data_wait_fraction']:.0%}",
            f"lr {row['learning_rate']:.2e}",
            f"ETA {format_duration(row['eta_seconds'])}",
        ]
        if row["skipped_samples"]:
            parts.append(f"{int(row['skipped_samples']):,} bad samples replaced")
        return ", ".join(parts)

    def close(self) -> None:
        """Flush and close."""
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.close()


def _samples_of(line: str) -> float:
    try:
        return float(json.loads(line)["samples_seen"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut by a kill
