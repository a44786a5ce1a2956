"""`pairmill pretrain`: a manifest in, checkpoints out."""

from __future__ import annotations

import argparse

from tools.commands.arguments import add_config_arguments, load

SUMMARY = "Pretrain a CLIP model on a curated dataset; the same line continues a stopped run."
EPILOG = """examples:
  pairmill pretrain demo/pretrain                          one process
  torchrun --nproc-per-node=2 --no-python pairmill pretrain demo/pretrain
                                                           two ranks: the same batches, the same
                                                           result
  pairmill pretrain my.yaml samples=12_800_000 --dry-run   the arithmetic and the model's size

SIGTERM or SIGUSR1: save after the step, exit 75. Results: OUTPUT/checkpoints, OUTPUT/metrics.jsonl,
OUTPUT/tensorboard."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    add_config_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from pretrain.config import PretrainConfig

    config = load(options, PretrainConfig)
    if config is None:
        return 0
    if options.dry_run:
        from pretrain.dry_run import dry_run

        print(dry_run(config))
        return 0
    from pretrain.engine import stop_processes
    from pretrain.train import STOPPED_ON_REQUEST, pretrain

    outcome = pretrain(config)
    stop_processes()
    if outcome.is_first_rank:
        rate = outcome.samples_per_second
        print(
            f"{'finished' if outcome.finished else 'stopped on request'} at "
            f"{outcome.samples_seen:,} samples{f', {rate:,.0f} samples/s' if rate else ''}: "
            f"{config.output}/checkpoints/latest"
        )
    return 0 if outcome.finished else STOPPED_ON_REQUEST
