"""How the jobs of a run stand: what Slurm knows, and where it has forgotten, what the jobs noted.

scontrol knows a job until some minutes after its end (MinJobAge); sacct knows all of them, where
the site keeps accounts; the events in the job's record are there always.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UsageError
from slurm.submission import RECORDS

_PATIENCE_SECONDS = 30


@dataclass(frozen=True)
class State:
    """A job or some tasks of an array."""

    state: str
    exit_code: str = ""
    restarts: str = ""
    nodes: str = ""
    elapsed: str = ""
    reason: str = ""
    source: str = "scontrol"


def records(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the jobs submitted for a run or a chain, oldest first: (record, submit.json)."""
    found: list[tuple[Path, dict[str, Any]]] = []
    homes = [run, run.with_name(f"{run.name}.work")]  # a dataset's records are in its work folder
    for file in sorted(f for home in homes for f in (home / RECORDS).glob("*/submit.json")):
        submitted = json.loads(file.read_text(encoding="utf-8"))
        if "stages" in submitted:
            stages = [Path(stage) for stage in submitted["stages"]]
            found += [
                (stage, json.loads((stage / "submit.json").read_text(encoding="utf-8")))
                for stage in stages
            ]
        else:
            found.append((file.parent, submitted))
    if not found:
        raise UsageError(
            f"nothing was submitted for {run}: it has no {RECORDS}/*/submit.json. Expected the "
            "`output` of a run or of a pipeline that `pairmill submit` submitted."
        )
    return sorted(found, key=lambda item: str(item[1]["submitted"]))


def _ask(*words: str) -> str:
    """Return what a command of Slurm prints; nothing where it is missing, fails or hangs."""
    if shutil.which(words[0]) is None:
        return ""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=_PATIENCE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""


def from_scontrol(text: str) -> Iterator[State]:
    """Read `scontrol show job --oneliner`: a line a job, or a line each group of array tasks."""
    for line in text.splitlines():
        fields = dict(re.findall(r"(\S+?)=(\S*)", line))
        if "JobState" in fields:
            reason = fields.get("Reason", "None")
            yield State(
                fields["JobState"],
                _exit_code(fields.get("ExitCode", "0:0")),
                fields.get("Restarts", ""),
                fields.get("NodeList", "").replace("(null)", ""),
                fields.get("RunTime", ""),
                "" if reason == "None" else reason,
            )


def from_sacct(text: str) -> Iterator[State]:
    """Read `sacct -X -n -P -o state,exitcode,nodelist,elapsed`."""
    for line in text.splitlines():
        state, code, nodes, elapsed = line.split("|")
        # "CANCELLED by 1000"
        yield State(state.split()[0], _exit_code(code), "", nodes, elapsed, source="sacct")


def _exit_code(text: str) -> str:
    code, _, signal = text.partition(":")
    return code if signal in ("", "0") else f"signal {signal}"


def ask_slurm(job: str) -> list[State]:
    """Return what Slurm knows of a job, by scontrol or by sacct; nothing where it has forgotten."""
    found = list(from_scontrol(_ask("scontrol", "show", "job", "--oneliner", job)))
    if not found:
        words = ("sacct", "-X", "-n", "-P", "-o", "state,exitcode,nodelist,elapsed", "-j", job)
        found = list(from_sacct(_ask(*words)))
    return found


def events(record: Path) -> list[str]:
    """Return the lines that the job wrote: time, job, start, what."""
    file = record / "events"
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def _line(record: Path, submitted: dict[str, Any]) -> list[str]:
    job = submitted["job"]
    found = ask_slurm(job)
    noted = events(record)
    if not found:
        return [job, submitted["kind"], "forgotten", "", "", "", ""]
    states = Counter(one.state for one in found)
    several = len(found) > 1
    state = ", ".join(f"{n} {s}" if several else s for s, n in sorted(states.items()))
    worst = next((one for one in found if one.exit_code not in ("", "0")), found[0])
    starts = max((int(line.split()[2]) for line in noted), default=0)
    return [
        job,
        submitted["kind"],
        state,
        worst.exit_code,
        str(starts),
        worst.nodes if not several else "",
        worst.elapsed if not several else "",
        worst.reason,
    ]


def describe(run: Path) -> str:
    """Return a table of a run's jobs, and below it the last event and the log of each."""
    header = ["job", "kind", "state", "exit", "starts", "nodes", "elapsed", "reason"]
    found = records(run)
    rows = [header, *(_line(record, submitted) for record, submitted in found)]
    rows = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for record, submitted in found:
        noted = events(record)
        last = noted[-1].split(maxsplit=3) if noted else []
        lines.append("")
        lines.append(f"{submitted['kind']} {submitted['job']}: {record}")
        if last:
            lines.append(f"  {last[0]} start {last[2]}: {last[3]}")
        lines += [f"  {line}" for line in _progress(Path(submitted["output"]), submitted["kind"])]
    return "\n".join(lines)


def _progress(run: Path, kind: str) -> list[str]:
    latest = run / "checkpoints/latest"
    if kind == "pretrain" and latest.is_file():
        return [f"newest checkpoint: {run / 'checkpoints' / latest.read_text().strip()}"]
    return []
