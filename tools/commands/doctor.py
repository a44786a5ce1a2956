"""`pairmill doctor`: look at the machine before the first run."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "Look at this machine: what pairmill needs, what is missing, and how to get it."
EPILOG = """examples:
  pairmill doctor                     this machine, runs written below the present folder
  pairmill doctor /scratch/me/runs    how fast is that disk?
  srun --nodes=2 --ntasks-per-node=1 pairmill doctor      on the nodes of a cluster

It starts Ray and a worker process, writes and removes 64 MiB, and takes some 20 seconds. A line is
`ok`, a `note` (something works less well or is not there) or a PROBLEM (exit code 1)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "folder", metavar="FOLDER", type=Path, nargs="?", default=Path(), help="where runs will be"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from tools.doctor import Level, examine

    num_problems = 0
    for finding in examine(options.folder):
        print(finding, flush=True)
        num_problems += finding.level is Level.PROBLEM
    print(f"\n{num_problems} problem(s)" if num_problems else "\nall that is needed is there")
    return 1 if num_problems else 0
