"""Run golden cases from the authors' own code through ours, print a table, fail on any difference.

`python -m tools.conformance curation|objectives|evaluation FOLDER`. Each part is a module beside
this one with `check(folder) -> iterator of Row`: it takes whatever files of the known names the
folder has, and reads expected values only to compare them. Exit codes: 0 all pass, 1 some fail,
2 nothing to check.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tools.conformance.table import render

PARTS = ("curation", "objectives", "evaluation")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check one folder of golden files and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.conformance", description=(__doc__ or "").split("\n")[0]
    )
    built = [part for part in PARTS if importlib.util.find_spec(f"tools.conformance.{part}")]
    parser.add_argument("part", choices=built, help="whose golden cases")
    parser.add_argument("folder", type=Path, help="the folder with the golden files")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        print(f"conformance: {options.folder} is not a folder", file=sys.stderr)
        return 2
    rows = list(importlib.import_module(f"tools.conformance.{options.part}").check(options.folder))
    if not rows:
        print(f"conformance: {options.folder} has no golden file of {options.part}; see its README")
        return 2
    render(rows, Console(width=140, highlight=False))
    counts = Counter(row.verdict for row in rows)
    line = f"{counts['pass']} pass, {counts['FAIL']} fail, {counts['not built']} not built"
    others = counts["not comparable"]
    print(f"\n{line}{f', {others} not comparable' if others else ''}")
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
