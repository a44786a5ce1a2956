"""`pairmill evaluate`: checkpoints in, results out."""

from __future__ import annotations

import argparse
from pathlib import Path

from configs.errors import UsageError
from tools.commands.arguments import add_flags, load

SUMMARY = "Evaluate checkpoints: features once, every method on them."
EPILOG = """examples:
  pairmill evaluate runs/demo/pretrain demo/evaluate       a run (its latest checkpoint)
  pairmill evaluate A/checkpoints/samples-000000115200 B demo/evaluate seed=1
  pairmill evaluate ViT-B-32/openai my_suite.yaml          an open_clip model and its pretrained tag
  pairmill evaluate ./folder my_suite.yaml --dry-run       a folder with open_clip_config.json

CHECKPOINT is a run folder, a checkpoint, an open_clip folder, or an open_clip name/tag."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument(
        "words",
        metavar="CHECKPOINT... CONFIG [key.path=value ...]",
        nargs="+",
        help="one or more checkpoints, then the suite, then overrides of its keys",
    )
    add_flags(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from evaluation.config import EvaluateConfig
    from evaluation.result import table
    from evaluation.suite import dry_run, evaluate

    options.overrides = [word for word in options.words if "=" in word and not Path(word).exists()]
    names = [word for word in options.words if word not in options.overrides]
    if len(names) < 2:
        raise UsageError(
            f"expected CHECKPOINT... CONFIG, got {' '.join(options.words)!r}; for example: "
            "pairmill evaluate runs/demo/pretrain demo/evaluate."
        )
    *checkpoints, options.config = names
    config = load(options, EvaluateConfig)
    if config is None:
        return 0
    print(dry_run(config, checkpoints) if options.dry_run else table(evaluate(config, checkpoints)))
    return 0
