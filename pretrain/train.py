"""The trainer: build, loop, step, close.

    outcome = pretrain(config)       # the same call continues a stopped run

Read `pretrain` first, then `loop`, then `Run.step` in run.py. The state of a run is its samples
seen: data order, masks and learning rate are functions of it. SIGTERM and SIGUSR1 mean: finish the
step, save, stop (exit 75).
"""

from __future__ import annotations

import time
from enum import Enum, auto
from pathlib import Path
from typing import IO, NamedTuple

import torch
import torch.distributed as dist

from configs.errors import PairmillError, UsageError
from configs.load import to_yaml
from configs.publish import publish_text
from pretrain.arithmetic import describe, never_at_peak
from pretrain.bad_samples import BadSamples, drop_rows_after
from pretrain.build import Parts, build_parts
from pretrain.config import PretrainConfig
from pretrain.data.batch import Batch
from pretrain.engine import start_processes
from pretrain.in_loop import Evaluate
from pretrain.ranks import Stop, StopRequest, on_first_rank
from pretrain.resume import Found, newest_sound, restore
from pretrain.run import Meter, Run, say
from pretrain.run_lock import lock_run
from pretrain.saving import Saver
from pretrain.stability import SpikeLog, Stability, drop_spikes_after
from pretrain.stages import Stages
from pretrain.telemetry import Telemetry, note_start
from pretrain.wandb_log import WandbLog, check_wandb

STOPPED_ON_REQUEST = 75  # exit code (EX_TEMPFAIL): worth requeueing


class Outcome(NamedTuple):
    """How a call of `pretrain` ended."""

    finished: bool
    samples_seen: int
    samples_per_second: float
    is_first_rank: bool


def pretrain(
    config: PretrainConfig, *, stop: Stop | None = None, evaluate: Evaluate | None = None
) -> Outcome:
    """Train to the end of the budget, or until asked to stop; continue where a checkpoint is.

    `stop` is asked after each step with the number of finished steps (beside the signals);
    `evaluate` is what config.evaluation asks for (in_loop.py). Raises ConfigError, DataError and
    CheckpointError with what to do.
    """
    if (config.evaluation is None) != (evaluate is None):
        raise UsageError("config.evaluation and a function `evaluate` go together; got one.")
    check_wandb(config.telemetry.wandb)
    request = StopRequest(stop)
    run = None
    try:
        stages, device = Stages.of(config), start_processes(config.engine.num_threads)
        run = start(config, stages, device, lock_run(config), evaluate)
        started, first = time.perf_counter(), run.samples_seen
        while loop(run, request) is Ended.DIVERGED:
            run = go_back(run)
    finally:
        request.restore_handlers()
        if run is not None:
            run.close()
    seconds = time.perf_counter() - started
    rate = (run.samples_seen - first) / seconds
    return Outcome(run.is_finished(), run.samples_seen, rate, run.parts.group.rank == 0)


def start(
    config: PretrainConfig,
    stages: Stages,
    device: torch.device,
    lock: IO[str] | None,
    evaluate: Evaluate | None,
    stability: Stability | None = None,
) -> Run:
    """Open the run at its newest sound checkpoint, or at the beginning.

    `stability` is that of the same run where it goes back within this process.
    """
    found = newest_sound(config)
    stage = stages.at(found.record.step if found else 0)
    parts = build_parts(config, stage, device, starts=found is None)
    return open_run(config, stages, parts, found, lock, evaluate, stability)


def go_back(run: Run) -> Run:
    """Return the run at its last checkpoint, with the data since then left out.

    Raises TrainingError where there is no checkpoint, or it went back too often already.
    """
    run.saver.wait()  # a checkpoint that is being written is the one to go back to
    found, stability = newest_sound(run.config), run.parts.engine.stability
    stability.check_can_go_back(found is not None, run.samples_seen, run.config.output)
    assert found is not None
    left_out = stability.go_back(found.record.samples_seen, run.samples_seen)
    if run.telemetry is not None:
        say(
            f"WARNING: {run.samples_seen:,} samples: too many steps in a row were not finite; back "
            f"to {found.record.samples_seen:,}, and past the data at positions {left_out}."
        )
        run.telemetry.close()
    device = run.parts.engine.device
    run.parts.engine.close()
    return start(run.config, run.stages, device, run.lock, run.evaluator, stability)


def open_run(
    config: PretrainConfig,
    stages: Stages,
    parts: Parts,
    found: Found | None,
    lock: IO[str] | None,
    evaluator: Evaluate | None,
    stability: Stability | None,
) -> Run:
    """Restore the checkpoint or start at zero, open the log."""
    folder = Path(config.output)
    point = restore(config, parts, found)
    if stability is not None:
        parts.engine.stability = stability
    telemetry = None
    samples_seen = parts.stage.samples_at(point.step_number)
    position = parts.engine.stability.position(samples_seen)
    bad_before = on_first_rank(lambda: drop_rows_after(folder, position))
    on_first_rank(lambda: drop_spikes_after(folder, position))
    if parts.group.rank == 0:
        publish_text(folder / "config.yaml", to_yaml(config))
        section, wandb = config.telemetry, None
        if section.wandb is not None:
            tree = config.model_dump(mode="json")
            wandb = WandbLog(folder, config.name, tree, section.wandb)
        telemetry = Telemetry(
            folder, samples_seen=samples_seen, total_samples=stages.num_samples, wandb=wandb
        )
        reason = "went back" if stability is not None else "resume" if found else "start"
        note_start(folder, samples_seen=samples_seen, reason=reason, num_ranks=parts.group.size)
        say_stage(parts)
        if section.device_peak_flops is None:
            say(
                "mfu is not logged: set telemetry.device_peak_flops to the dense peak of one "
                f"device in {config.engine.precision} (model_flops_per_second is logged)."
            )
    dist.barrier()  # no rank writes before rank 0 has made the folder and cut the logs
    return Run(
        config=config,
        stages=stages,
        parts=parts,
        step_number=point.step_number,
        telemetry=telemetry,
        bad_samples=BadSamples(folder, rank=parts.group.rank, before=bad_before),
        lock=lock,
        spikes=SpikeLog(folder, rank=parts.group.rank),
        saved_step=point.step_number,
        saver=Saver(config, parts.group),
        evaluator=evaluator,
    )


def say_stage(parts: Parts) -> None:
    """Say what the stage is that begins or goes on."""
    say(describe(parts.stage, parts.data, parts.group.size))
    warning = never_at_peak(parts.stage)
    if warning is not None:
        say(warning)


class Ended(Enum):
    """Why steps are no longer taken."""

    FINISHED = auto()
    STOPPED = auto()  # on request
    DIVERGED = auto()  # too many steps in a row were not finite


def loop(run: Run, request: StopRequest) -> Ended:
    """Take steps until the budget is spent or a stop is agreed on, stage after stage."""
    while not run.is_finished():
        if run.step_number == run.stage.last_step:
            stage = run.stages.after(run.stage)
            assert stage is not None, "a run that is not finished has a stage left"
            run.enter(stage)
            if run.telemetry is not None:
                say_stage(run.parts)
        ended = loop_stage(run, request)
        if ended is not Ended.FINISHED:
            return ended
    return Ended.FINISHED


def loop_stage(run: Run, request: StopRequest) -> Ended:
    """Take the steps of the present stage, save on the way; return why it ended."""
    stability = run.parts.engine.stability
    source = run.parts.batches(
        first=run.samples_seen,
        last=run.stage.last_sample,
        num_workers=run.stage.config.data.num_workers,
        skipped=stability.skipped_ranges,
    )
    run.meter = Meter()
    while run.step_number < run.stage.last_step:
        batch = run.fetch(source)
        error = batch if isinstance(batch, PairmillError) else None
        if request.agreed(run.step_number, error):
            run.save(is_last=True)
            return Ended.STOPPED
        assert isinstance(batch, Batch)
        run.step(batch)
        at_end = run.step_number == run.stage.last_step
        if stability.must_go_back(at_end=at_end):
            return Ended.DIVERGED
        run.evaluate()
        if run.checkpoint_due() or at_end:
            run.save(is_last=run.is_finished())
    return Ended.FINISHED
