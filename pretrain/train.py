"""The trainer: build, loop, step, close.

    outcome = pretrain(config)       # the same call continues a stopped run

Read `pretrain` first, then `Run.step`. The state of a run is its samples seen: data order, masks
and learning rate are functions of it. SIGTERM and SIGUSR1 mean: finish the step, save, stop (exit
75).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.distributed as dist

from configs.errors import PairmillError, UsageError
from configs.load import to_yaml
from configs.publish import publish_text
from pretrain.accumulation import backward
from pretrain.arithmetic import describe
from pretrain.bad_samples import BadSamples, check_share, drop_rows_after
from pretrain.build import Parts, build_parts, next_parts
from pretrain.config import PretrainConfig
from pretrain.data.loader import Batch
from pretrain.engine import StepReport, start_processes
from pretrain.in_loop import Evaluate, evaluate_model
from pretrain.inputs import forward_inputs, micro_batches
from pretrain.objectives.accuracy import batch_accuracy
from pretrain.ranks import Stop, StopRequest, on_first_rank
from pretrain.resume import Found, newest_sound, restore
from pretrain.run_lock import lock_run
from pretrain.saving import ResumePoint, Saver
from pretrain.stability import SpikeLog, Stability, drop_spikes_after
from pretrain.stages import Stage, Stages
from pretrain.telemetry import Telemetry, peak_memory_bytes

STOPPED_ON_REQUEST = 75  # exit code (EX_TEMPFAIL): worth requeueing


class Outcome(NamedTuple):
    """How a call of `pretrain` ended."""

    finished: bool
    samples_seen: int
    samples_per_second: float
    is_first_rank: bool


@dataclass
class Meter:
    """Sums over the steps since the last logged row."""

    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    steps: int = 0
    clipped: int = 0


@dataclass
class Run:
    """A run in progress on one rank."""

    config: PretrainConfig
    stages: Stages
    parts: Parts  # of the present stage
    step_number: int
    telemetry: Telemetry | None  # rank 0 alone
    bad_samples: BadSamples
    lock: IO[str] | None  # rank 0 alone
    spikes: SpikeLog
    saved_step: int
    saver: Saver
    evaluator: Evaluate | None
    is_owed: bool = False  # a checkpoint, because the step it was due at was skipped
    meter: Meter = field(default_factory=Meter)

    @property
    def samples_seen(self) -> int:
        """Samples of finished steps, over all ranks."""
        return self.stage.samples_at(self.step_number)

    @property
    def stage(self) -> Stage:
        """The present stage."""
        return self.parts.stage

    def enter(self, stage: Stage) -> None:
        """Go on in the next stage."""
        self.parts = next_parts(self.parts, stage)

    def step(self, batch: Batch) -> None:
        """Encode, compare, update; log where a log interval ends in this step."""
        engine = self.parts.engine
        compared: Any = {"similarity": engine.model.similarity, "group": self.parts.group}
        progress = self.samples_seen / self.stages.num_samples
        inputs = [
            forward_inputs(part, self.parts.objective, engine.model, self.parts.teacher)
            for part in micro_batches(batch, self.stage.config.micro_batch_size)
        ]
        features, loss = backward(
            engine,
            inputs,
            lambda features: self.parts.objective(features._replace(progress=progress), **compared),
        )
        learning_rate = self.stage.learning_rate(self.samples_seen)
        report = engine.step(learning_rate)
        if self.parts.ema is not None and not report.skipped:
            self.parts.ema.update(self.stage.batch)
        self.step_number += 1
        self.meter.steps += 1
        self.bad_samples.note(batch.bad)
        self._watch(loss.loss, report, batch.key)
        if self._interval_ends(self.config.intervals.log_samples) or self.is_finished():
            accuracy_i2t, accuracy_t2i = batch_accuracy(features, **compared)
            means = {"loss": loss.loss, "accuracy_i2t": accuracy_i2t, "accuracy_t2i": accuracy_t2i}
            if len(loss.terms) > 1:
                means |= {f"loss/{name}": term for name, term in loss.terms.items()}
            self._log(means, report, learning_rate)

    def _watch(self, loss: torch.Tensor, report: StepReport, keys: list[str]) -> None:
        """Count the step; write it down where it was skipped or its loss is a spike."""
        mean, group = loss.detach().float().clone(), self.parts.group
        if group.size > 1:
            dist.all_reduce(mean)
        stability, value = self.parts.engine.stability, float(mean) / group.size
        if stability.note(value, skipped=report.skipped, clipped=report.clipped):
            self.spikes.write(
                samples_seen=self.samples_seen,
                position=stability.position(self.samples_seen - self.stage.batch),
                loss=value,
                gradient_norm=report.gradient_norm,
                keys=keys,
            )
        self.meter.clipped += report.clipped

    def evaluate(self) -> None:
        """Evaluate the model where an interval of it ended in the last step; log the numbers.

        Every rank must call it. Data workers go on meanwhile.
        """
        section, parts = self.config.evaluation, self.parts
        if self.evaluator is None or section is None:
            return
        if not self._interval_ends(section.interval_samples) and not self.is_finished():
            return
        started = time.perf_counter()
        found = evaluate_model(self.evaluator, parts.engine, parts.tokenizer, parts.group)
        seconds = time.perf_counter() - started
        self.meter.started += seconds  # not time of training
        if self.telemetry is not None:
            self.telemetry.log_evaluation(self.step_number, self.samples_seen, found, seconds)

    def fetch(self, source: Iterator[Batch | PairmillError]) -> Batch | PairmillError:
        """Return the next batch, or the error that making it ended with; measure the wait."""
        waiting = time.perf_counter()
        batch = next(source)
        self.meter.waited += time.perf_counter() - waiting
        return batch

    def save(self, *, is_last: bool = False) -> None:
        """Have a checkpoint written, unless this step has one; every rank must call it.

        Not of a step that was skipped: it is owed until one is taken. A failure is a warning, and
        raises CheckpointError where the run ends with it.
        """
        self.is_owed = bool(self.parts.engine.stability.skipped_in_a_row)
        if self.saved_step != self.step_number and not self.is_owed:
            _, bad = self._over_ranks([])
            num_bad = sum(bad.values())
            ranges = tuple(self.parts.engine.stability.skipped_ranges)
            point = ResumePoint(self.step_number, num_bad, ranges)
            failure = self.saver.save(self.parts, point)
            self.saved_step = self.step_number if self.saver.is_writing else -1
            if not self.config.checkpoint.asynchronous:
                failure = self.saver.wait() or failure
            if failure is not None and self.telemetry is not None:
                print(
                    f"WARNING: a checkpoint could not be saved: {failure}. Training goes on from "
                    "memory; the next interval tries again.",
                    file=sys.stderr,
                    flush=True,
                )
        if is_last:
            self.saver.finish()

    def close(self) -> None:
        """Close the log and let go of the run folder."""
        if self.telemetry is not None:
            self.telemetry.close()
        if self.lock is not None:
            self.lock.close()

    def is_finished(self) -> bool:
        """Whether the budget is spent."""
        return self.step_number >= self.stages.num_steps

    def checkpoint_due(self) -> bool:
        """Whether a checkpoint interval ended in the last step, or in one that was skipped."""
        return self.is_owed or self._interval_ends(self.config.intervals.checkpoint_samples)

    def _interval_ends(self, interval: int) -> bool:
        before = self.samples_seen - self.stage.batch
        return before // interval != self.samples_seen // interval

    def _log(
        self, means: dict[str, torch.Tensor], report: StepReport, learning_rate: float
    ) -> None:
        meter = self.meter
        values, bad = self._over_ranks(list(means.values()))
        logged = dict(zip(means, values, strict=True))
        stability = self.parts.engine.stability
        elapsed = time.perf_counter() - meter.started
        rate = meter.steps * self.stage.batch / elapsed
        left = self.stages.num_samples - self.samples_seen
        row = {
            "step": self.step_number,
            "stage": self.stage.number,
            "samples_seen": self.samples_seen,
            **self._epoch(),
            **logged,
            "samples_per_second": rate,
            "data_wait_fraction": meter.waited / elapsed,
            "gradient_norm": report.gradient_norm,
            "clip_rate": meter.clipped / meter.steps,
            "skipped_steps": stability.skipped_steps,
            "rollbacks": stability.rollbacks,
            "logit_scale": float(self.parts.engine.model.clip.logit_scale.detach().exp()),
            "learning_rate": learning_rate,
            "peak_memory_bytes": peak_memory_bytes(),
            "skipped_samples": sum(bad.values()),
            **{f"skipped/{kind}": n for kind, n in bad.items()},
            "eta_seconds": left / rate,
            "checkpoint_stall_seconds": self.saver.stall_seconds,
            "seconds": elapsed,
        }
        self.meter = Meter()
        self.saver.stall_seconds = 0.0
        if self.telemetry is not None:
            self.telemetry.log(row)
        check_share(
            bad,
            samples_seen=self.samples_seen,
            limit=self.config.data.max_bad_fraction,
            folder=self.config.output,
        )

    def _epoch(self) -> dict[str, float]:
        num_samples = self.parts.data.num_samples  # of a stream: not known
        return {"epoch": self.samples_seen / num_samples} if num_samples else {}

    def _over_ranks(self, means: list[torch.Tensor]) -> tuple[list[float], dict[str, int]]:
        """Return the means of `means` over the ranks, and the bad samples of all by kind."""
        device = self.parts.engine.device
        here = torch.tensor(self.bad_samples.counts_here(), device=device).float()
        values = torch.cat([*(mean.detach().float().reshape(1) for mean in means), here])
        group = self.parts.group
        if group.size > 1:
            dist.all_reduce(values)
        sums = values.tolist()
        bad = self.bad_samples.in_all(sums[len(means) :])
        return [value / group.size for value in sums[: len(means)]], bad


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
        telemetry = Telemetry(folder, samples_seen=samples_seen, total_samples=stages.num_samples)
        say(describe(parts.stage, parts.data, parts.group.size))
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


def say(text: str) -> None:
    """Write a line for people."""
    print(text, file=sys.stderr, flush=True)


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
                say(describe(stage, run.parts.data, run.parts.group.size))
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
