"""One job as sbatch gets it: the command line, its environment, and what is kept of it.

What is kept, in the run's folder (of a curation: in DATASET.work):

    slurm/pretrain-0001/
        submit.json     the command, sbatch's line and variables, git revision, versions, the job
        config.yaml     the resolved configuration, which is what the job runs
        setup.sh        the site's lines of shell
        events          a line for each start, requeue and end, written by the job
        pretrain-17.log what it printed, all starts together
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from configs.errors import PairmillError, UsageError
from configs.publish import publish_text
from slurm.provenance import provenance
from slurm.site import Kind, SiteConfig

SCRIPTS = Path(__file__).resolve().parent
RECORDS = "slurm"  # the folder of the records in a run's folder


class SlurmError(PairmillError):
    """Slurm did not take a job, or cannot be asked."""


@dataclass(frozen=True)
class Submission:
    """A job to submit. `words` are the script's, but for the configuration, which is recorded."""

    kind: Kind
    output: Path  # what the job makes
    home: Path  # the folder whose slurm/ holds its records: of the run, of curation's work
    config: str  # resolved, as YAML
    checkpoints: tuple[str, ...] = ()  # before the configuration (evaluate)
    flags: tuple[str, ...] = ()  # of sbatch, after the site's
    site: SiteConfig = field(default_factory=SiteConfig)

    def record(self) -> Path:
        """Return the folder of the job's record, which is not there yet."""
        return next_record(self.home, self.kind)

    def variables(self, record: Path, python: str) -> dict[str, str]:
        """Return the variables that the job gets beside those of the shell that submits."""
        found = {
            "PAIRMILL_PYTHON": python,
            **self.site.variables(),
            "PAIRMILL_RECORD": str(record),
        }
        return found | ({"PAIRMILL_SETUP": str(record / "setup.sh")} if self.site.setup else {})

    def command(self, record: Path, *, after: Sequence[str] = ()) -> list[str]:
        """Return sbatch's line; `after` are jobs that must have ended well before."""
        task = "-%A_%a.log" if self.is_array else "-%j.log"
        words = ["sbatch", "--parsable", f"--output={record}/{self.kind}{task}"]
        words += [*self.site.flags(self.kind), *self.flags]
        if after:
            words += [f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"]
        words.append(str(SCRIPTS / f"{self.kind}.sbatch"))
        return [*words, *self.checkpoints, str(record / "config.yaml")]

    @property
    def is_array(self) -> bool:
        """Whether the job is an array."""
        return self.last_flag("array") is not None

    def last_flag(self, name: str) -> str | None:
        """Return the value of a flag as it holds for the job; None where it is not given."""
        values = [
            word.partition("=")[2]
            for word in [*self.site.flags(self.kind), *self.flags]
            if word.partition("=")[0] == f"--{name}"
        ]
        return values[-1] if values else None

    def num_processes(self) -> int:
        """Return how many processes the job starts, as far as the flags tell."""
        nodes = self.last_flag("nodes") or "1"
        num_nodes = int(nodes) if nodes.isdecimal() else 1
        gpus = re.fullmatch(r"(?:[^:]*:)*(\d+)", self.last_flag("gpus-per-node") or "")
        each = self.site.processes_per_node or (int(gpus.group(1)) if gpus else 1)
        return num_nodes * max(1, each)


def next_record(home: Path, kind: str) -> Path:
    """Return the folder of the next record: HOME/slurm/KIND-0001, ..."""
    folder = home.absolute() / RECORDS
    taken = [path.name.rpartition("-")[2] for path in folder.glob(f"{kind}-[0-9][0-9][0-9][0-9]")]
    return folder / f"{kind}-{max(map(int, taken), default=0) + 1:04d}"


def shown(variables: Mapping[str, str], command: Sequence[str]) -> str:
    """Return a line that can be pasted into a shell."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in variables.items()), shlex.join(command)])


def write_record(record: Path, config: str, setup: Sequence[str] = ()) -> None:
    """Make the folder with the files that the job reads; raises UsageError where it is there."""
    try:
        record.mkdir(parents=True)
    except FileExistsError:
        raise UsageError(f"{record} is there already: another submission? Submit again.") from None
    publish_text(record / "config.yaml", config)
    if setup:
        publish_text(record / "setup.sh", "\n".join([*setup, ""]))


def call_sbatch(command: Sequence[str], variables: Mapping[str, str]) -> str:
    """Submit; return the job's number. Raises SlurmError with what sbatch said."""
    if shutil.which(command[0]) is None:
        raise SlurmError(
            "there is no sbatch on this machine. Submit from a login node of the cluster; "
            "--dry-run shows here what would be submitted."
        )
    done = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SlurmError(f"sbatch refused: {done.stderr.strip()}\n{shown(variables, command)}")
    return done.stdout.strip().partition(";")[0]


def submit(
    submission: Submission, record: Path, typed: Sequence[str], *, after: Sequence[str] = ()
) -> str:
    """Write the record, submit, note the job in it; return the job's number.

    Raises SlurmError where sbatch refuses; nothing is left behind then.
    """
    write_record(record, submission.config, submission.site.setup)
    variables = submission.variables(record, sys.executable)
    command = submission.command(record, after=after)
    try:
        job = call_sbatch(command, variables)
    except PairmillError:
        shutil.rmtree(record)
        raise
    _publish(
        record,
        {
            "job": job,
            "kind": submission.kind,
            "output": str(submission.output.absolute()),
            "typed": list(typed),
            "sbatch": command,
            "variables": variables,
            "after": list(after),
        },
    )
    return job


def record_chain(folder: Path, config: str, typed: Sequence[str], stages: Sequence[Path]) -> Path:
    """Record a chain of submitted jobs below its own folder; return the record."""
    record = next_record(folder, "pipeline")
    write_record(record, config)
    _publish(record, {"typed": list(typed), "stages": [str(stage) for stage in stages]})
    return record


def _publish(record: Path, content: Mapping[str, Any]) -> None:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    whole = {**content, "submitted": now, **provenance()}
    publish_text(record / "submit.json", json.dumps(whole, indent=2) + "\n")
