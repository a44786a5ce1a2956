"""`pairmill index`: index and manifest for tars that others wrote."""

from __future__ import annotations

import argparse

SUMMARY = "Index tars that others wrote, in place, so that they can be trained on."
EPILOG = """examples:
  pairmill index data/cc12m                          a folder of tars
  pairmill index 'data/cc12m/{00000..01242}.tar'     a brace pattern

Writes SHARD.index.parquet beside each tar, and manifest.json + shards.parquet in their folder; the
tars are not rewritten. Then: pairmill pretrain CONFIG data.manifest=data/cc12m"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "shards", metavar="SHARDS", nargs="+", help="folders, tars or brace patterns"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from curation.arrow import keep_pandas_out
    from curation.job import index

    keep_pandas_out()
    print(index(options.shards))
    return 0
