"""`pairmill curate`: raw shards in, a curated dataset out."""

from __future__ import annotations

import argparse

from tools.commands.arguments import add_config_arguments, load

SUMMARY = "Curate raw shards: scan, decide, write, report."
EPILOG = """examples:
  pairmill curate demo/curate                       the demo's recipe
  pairmill curate my.yaml --dry-run                 what would be read, and whether it can be
  pairmill curate my.yaml 'stages=[scan, decide]'   stop before writing
  pairmill curate my.yaml rules.2.t=500             another threshold for the third rule

The same line continues a stopped run: what is finished is not done again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    add_config_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from curation.arrow import keep_pandas_out
    from curation.config import CurateConfig
    from curation.job import curate, dry_run

    keep_pandas_out()
    config = load(options, CurateConfig)
    if config is None:
        return 0
    print(dry_run(config) if options.dry_run else curate(config).text())
    return 0
