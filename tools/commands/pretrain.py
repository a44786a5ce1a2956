"""`pairmill pretrain`: a manifest in, checkpoints out."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from tools.commands.arguments import add_config_arguments, load

if TYPE_CHECKING:
    from pretrain.config import PretrainConfig
    from pretrain.in_loop import Evaluate

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

    stopping = _stop_at_once_before_the_start()
    config = load(options, PretrainConfig)
    if config is None:
        return 0
    evaluate = _evaluator(config)
    if options.dry_run:
        from pretrain.dry_run import dry_run

        print(dry_run(config))
        return 0
    from pretrain.engine import stop_processes
    from pretrain.train import STOPPED_ON_REQUEST, pretrain

    outcome = pretrain(config, evaluate=evaluate)
    stopping.too_late = True
    stop_processes()
    if outcome.is_first_rank:
        rate = outcome.samples_per_second
        print(
            f"{'finished' if outcome.finished else 'stopped on request'} at "
            f"{outcome.samples_seen:,} samples{f', {rate:,.0f} samples/s' if rate else ''}: "
            f"{config.output}/checkpoints/latest"
        )
    return 0 if outcome.finished else STOPPED_ON_REQUEST


class _Stopping:
    """What a signal does while the trainer itself does not listen: before it has started it ends
    the process, worth requeueing; once everything is saved it changes nothing.
    """

    too_late = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.too_late:
            os._exit(os.EX_TEMPFAIL)


def _stop_at_once_before_the_start() -> _Stopping:
    stopping = _Stopping()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stopping)
    return stopping


def _evaluator(config: PretrainConfig) -> Evaluate | None:
    """Return what config.evaluation asks for; the trainer itself does not know the suite."""
    if config.evaluation is None:
        return None
    from configs.load import load_config
    from evaluation.config import EvaluateConfig
    from evaluation.in_training import InTraining

    suite = load_config(config.evaluation.suite, EvaluateConfig)
    return InTraining(suite, Path(config.output) / "probe")
