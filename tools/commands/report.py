"""`pairmill report`: one self-contained HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "Report on a dataset, a run or results: one self-contained HTML page."
EPILOG = """examples:
  pairmill report runs/demo                          all that is in it: dataset, run, results
  pairmill report runs/demo/dataset                  a curated dataset alone
  pairmill report runs/demo/pretrain runs/demo/results --output=page.html
  pairmill report runs/a/results runs/b/results      checkpoints side by side, few-shot curves
  pairmill report runs/demo/results --export=table.md     the results alone: .csv or .md

A folder is known by what it holds: report.json (a dataset), metrics.jsonl (a run), results.jsonl
(results), or folders with these."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("folders", metavar="FOLDER", type=Path, nargs="+", help="what to report on")
    parser.add_argument(
        "--output", type=Path, help="the page to write (default: report.html in the first folder)"
    )
    parser.add_argument(
        "--export",
        metavar="TABLE",
        type=Path,
        help="write the results as a table (.csv, .md), no page",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from tools.report import report_on

    if options.export is not None:
        from tools.report.export import export
        from tools.report.sources import find, read_scorecard

        _, _, results = find(options.folders)
        print(export(read_scorecard(results).results, options.export))
        return 0
    output = options.output or options.folders[0] / "report.html"
    print(report_on(options.folders, output))
    return 0
