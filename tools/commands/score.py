"""`pairmill score`: models judge samples; columns and vectors keep what they say."""

from __future__ import annotations

import argparse

from tools.commands.arguments import add_config_arguments, load

SUMMARY = "Score samples with models: columns of the index to filter by, vectors beside it."
EPILOG = """examples:
  pairmill score score/demo                       the demo's dataset by the demo's model
  pairmill score my_scores.yaml --dry-run         what is missing, and whether it can be made
  pairmill score my_scores.yaml actors=8 resources.num_gpus=1 resources.num_cpus=8
  pairmill score my_scores.yaml model.checkpoint=runs/new replace=true

Scores stay: the same line makes what is missing. Rules of `pairmill curate` then judge by a column,
as often as you like:  rules: [{name: score, column: clip_score, min: 0.28}], or top_fraction."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    add_config_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from tools.score.config import ScoreConfig

    config = load(options, ScoreConfig)
    if config is None:
        return 0
    from tools.score.job import dry_run
    from tools.score.job import run as score

    print(dry_run(config) if options.dry_run else score(config))
    return 0
