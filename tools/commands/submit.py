"""`pairmill submit`: check a run here, then hand it to Slurm."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import PairmillError, UsageError
from tools.commands.arguments import complete, complete_config

if TYPE_CHECKING:
    from configs.registry import Config
    from slurm.pipeline import PipelineConfig
    from slurm.site import Kind, SiteConfig
    from slurm.submission import Submission

SUMMARY = "Submit to Slurm: check the run here, then sbatch it; a pipeline is chained."
EPILOG = """examples:
  pairmill submit pretrain my.yaml samples=1_000_000 --nodes=8 --gpus-per-node=8 --time=24:00:00
  pairmill submit curate demo/curate --nodes=4 --dry-run     what would be run, to the letter
  pairmill submit evaluate A B C my_suite.yaml --array=0-7   an array over the queue
  pairmill submit pipeline slurm/demo                        curate, then pretrain, then evaluate
  pairmill submit status runs/demo/pretrain                  how a run's or pipeline's jobs stand

Flags with two dashes go to sbatch as they are (--flag=value). What is the same for every job of
a site, its account, partition, modules, container, stands in ~/.config/pairmill/site.yaml, or the
file of PAIRMILL_SITE: see configs/slurm/site_example.yaml. docs/slurm.md is the guide."""
KINDS = ("curate", "pretrain", "evaluate", "pipeline", "status")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("kind", choices=KINDS, help="what to submit; status: how a run stands")
    words = parser.add_argument(
        "words",
        metavar="CONFIG [key.path=value ...] [--sbatch-flag=value ...]",
        nargs="*",
        help="as for the command of that name; RUN for status",
    )
    complete(words, complete_config)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the run, print exactly what would be run, submit nothing",
    )
    parser.set_defaults(foreign_flags=[])


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    overrides = [w for w in options.words if "=" in w and not Path(w).exists()]
    names = [word for word in options.words if word not in overrides]
    if options.kind == "status":
        return _status(names)
    if not names or (options.kind != "evaluate" and len(names) > 1):
        raise UsageError(f"expected one CONFIG, got {' '.join(names) or 'none'}.")
    from slurm.site import load_site

    site = load_site()
    flags = options.foreign_flags
    if options.kind == "pipeline":
        return _pipeline(names[0], overrides, flags, site, dry_run=options.dry_run)
    submission = build(options.kind, names, overrides, flags, site)
    check(submission, [*names, *overrides])
    _submit([submission], dry_run=options.dry_run)
    return 0


def build(
    kind: Kind,
    names: Sequence[str],
    overrides: Sequence[str],
    flags: Sequence[str],
    site: SiteConfig,
) -> Submission:
    """Load a job's configuration (its last name) and return what would be submitted."""
    from configs.load import to_yaml
    from slurm.submission import Submission

    config, output, home = _load(kind, names, overrides)
    return Submission(kind, output, home, to_yaml(config), tuple(names[:-1]), tuple(flags), site)


def _load(kind: Kind, names: Sequence[str], overrides: Sequence[str]) -> tuple[Config, Path, Path]:
    """Return the configuration, what the job makes, and the folder whose slurm/ records it."""
    from configs.load import load_config

    if kind == "curate":
        from curation.config import CurateConfig

        curation = load_config(names[-1], CurateConfig, overrides)
        return curation, curation.output_dir, curation.work_dir
    if kind == "pretrain":
        from pretrain.config import PretrainConfig

        training = load_config(names[-1], PretrainConfig, overrides)
        return training, Path(training.output), Path(training.output)
    from evaluation.config import EvaluateConfig

    if len(names) < 2:
        raise UsageError("expected CHECKPOINT... CONFIG, got one of them.")
    evaluation = load_config(names[-1], EvaluateConfig, overrides)
    return evaluation, evaluation.output_folder, evaluation.output_folder


def check(submission: Submission, words: Sequence[str]) -> None:
    """Run the command's own --dry-run here, as many processes as the job would have in mind.

    Raises UsageError where it fails. Where torch is not installed (a login node) what needs it is
    left to the job's preflight, and that is said.
    """
    kind = submission.kind
    if kind != "curate" and importlib.util.find_spec("torch") is None:
        print(
            f"submit: {kind} is checked only as far as its configuration goes: torch is not "
            "installed here.",
            file=sys.stderr,
        )
        return
    done = subprocess.run(
        [sys.executable, "-m", "tools.cli", kind, *words, "--dry-run"],
        env={**os.environ, "WORLD_SIZE": str(submission.num_processes())},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UsageError(
            f"not submitted: `pairmill {kind} ... --dry-run` ended with exit code "
            f"{done.returncode}; see above."
        )
    print(done.stdout.rstrip(), file=sys.stderr)


def _submit(
    submissions: Sequence[Submission], *, dry_run: bool
) -> list[tuple[Submission, Path, str]]:
    """Submit the jobs, each after the one before; return (submission, record, job)."""
    from slurm.submission import shown, submit

    done: list[tuple[Submission, Path, str]] = []
    for number, submission in enumerate(submissions):
        record = submission.record()
        if dry_run:
            after = [f"<{submissions[number - 1].kind}>"] if number else []
            variables = submission.variables(record, sys.executable)
            print(shown(variables, submission.command(record, after=after)))
            for line in submission.site.setup:
                print(f"  in the job first: {line}")
            continue
        try:
            job = submit(submission, record, sys.argv, after=[done[-1][2]] if done else [])
        except PairmillError:
            _withdraw([job for _, _, job in done])
            raise
        done.append((submission, record, job))
        print(f"{job}  {submission.kind}  {record}")
    return done


def _withdraw(jobs: Sequence[str]) -> None:
    """Cancel the first jobs of a chain whose next was refused: half a chain helps nobody."""
    if jobs:
        subprocess.run(["scancel", *jobs], check=False)
        print(f"submit: cancelled {', '.join(jobs)}, as the chain is not whole.", file=sys.stderr)


def _pipeline(
    name: str, overrides: Sequence[str], flags: Sequence[str], site: SiteConfig, *, dry_run: bool
) -> int:
    from configs.load import load_config, to_yaml
    from slurm.pipeline import PipelineConfig
    from slurm.site import flag_words
    from slurm.submission import record_chain

    config = load_config(name, PipelineConfig, overrides)
    submissions: list[Submission] = []
    for kind, stage in config.stages:
        checkpoints = list(getattr(stage, "checkpoints", ()))
        if kind == "evaluate" and not checkpoints:
            checkpoints = [str(submissions[-1].output)]
        names = [*checkpoints, stage.config]
        all_flags = [*flag_words(stage.sbatch), *flags]
        submission = build(kind, names, stage.overrides, all_flags, site)
        if _inputs_are_there(config, kind, checkpoints):
            check(submission, [*names, *stage.overrides])
        else:
            _check_link(submission, submissions)
        submissions.append(submission)
    done = _submit(submissions, dry_run=dry_run)
    if done:
        record_chain(config.output, to_yaml(config), sys.argv, [record for _, record, _ in done])
        print(f"status: pairmill submit status {config.output}", file=sys.stderr)
    return 0


def _inputs_are_there(config: PipelineConfig, kind: Kind, checkpoints: Sequence[str]) -> bool:
    """Whether a stage reads nothing that a stage before it has yet to write."""
    if kind == "pretrain":
        return config.curate is None
    return kind == "curate" or (config.pretrain is None and all(map(os.path.exists, checkpoints)))


def _check_link(submission: Submission, before: Sequence[Submission]) -> None:
    """Check that a stage reads what the one before it will write, or what is there already."""
    import yaml

    if submission.kind == "evaluate":
        reads = list(submission.checkpoints)
    else:
        data = yaml.safe_load(submission.config)["data"]
        reads = [data.get("manifest"), *(part["manifest"] for part in data.get("mixture", ()))]
    made = [one.output.absolute() for one in before]
    for path in (Path(str(read)) for read in reads if read and "://" not in str(read)):
        is_made = any(path.absolute().is_relative_to(folder) for folder in made)
        if not is_made and not path.exists():
            raise UsageError(
                f"{submission.kind} reads {path}, which is not there and which no stage before "
                f"it writes; they write {', '.join(str(one.output) for one in before)}."
            )
    print(
        f"submit: {submission.kind} reads what the chain has yet to write; its configuration was "
        "checked, its data is by the job.",
        file=sys.stderr,
    )


def _status(names: Sequence[str]) -> int:
    from slurm.status import describe

    if len(names) != 1:
        raise UsageError("expected the folder of a run: pairmill submit status RUN.")
    print(describe(Path(names[0])))
    return 0
