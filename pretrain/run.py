"""A run in progress on one rank: one step, the log, the save.

`Run.step` is what happens to a batch; train.py has the loop around it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import torch
import torch.distributed as dist

from configs.errors import PairmillError
from pretrain.accumulation import backward
from pretrain.bad_samples import BadSamples, check_share
from pretrain.build import Parts, next_parts
from pretrain.config import PretrainConfig
from pretrain.data.batch import Batch
from pretrain.engine import StepReport
from pretrain.estimate import step_flops
from pretrain.in_loop import Evaluate, evaluate_model
from pretrain.inputs import forward_inputs, micro_batches
from pretrain.objectives.accuracy import batch_accuracy
from pretrain.saving import ResumePoint, Saver
from pretrain.stability import SpikeLog
from pretrain.stages import Stage, Stages
from pretrain.telemetry import Telemetry, peak_memory_bytes


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
    step_seconds: float | None = None  # as last measured, the mean of an interval of the log

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
        helpers = self.parts.teacher, self.parts.mean_tower
        inputs = [
            forward_inputs(part, self.parts.objective, engine.model, *helpers)
            for part in micro_batches(batch, self.stage.config.micro_batch_size)
        ]
        features, loss = backward(
            engine,
            inputs,
            lambda features: self.parts.objective(features._replace(progress=progress), **compared),
        )
        learning_rate = self.stage.learning_rate(self.samples_seen)
        report = engine.step(learning_rate)
        self.step_number += 1
        if not report.skipped:
            self._move_averages()
        self.meter.steps += 1
        self.bad_samples.note(batch.bad)
        self._watch(loss.loss, report, batch.key)
        if self._interval_ends(self.config.intervals.log_samples) or self.is_finished():
            accuracy_i2t, accuracy_t2i = batch_accuracy(features, **compared)
            means = {"loss": loss.loss, "accuracy_i2t": accuracy_i2t, "accuracy_t2i": accuracy_t2i}
            if len(loss.terms) > 1:
                means |= {f"loss/{name}": term for name, term in loss.terms.items()}
            self._log(means, report, learning_rate)

    def _move_averages(self) -> None:
        """Take the step's weights into the averages of them; every rank must call it."""
        engine, mean_tower = self.parts.engine, self.parts.mean_tower
        if self.parts.ema is not None:
            self.parts.ema.update(self.stage.batch)
        if mean_tower is not None:
            weights = mean_tower.sources(engine.model)
            with engine.full_parameters(weights):
                mean_tower.update(weights, self.samples_seen / self.stages.num_samples)

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
        found = evaluate_model(
            self.evaluator, parts.engine, parts.tokenizer, parts.group, self.samples_seen
        )
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
            failure = self.saver.save(self.parts, point, step_seconds=self.step_seconds)
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
        self.step_seconds = elapsed / meter.steps
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
            "checkpoint_stall_fraction": self.saver.stall_seconds / elapsed,
            "seconds": elapsed,
            **self._utilization(rate),
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

    def _utilization(self, samples_per_second: float) -> dict[str, float]:
        """Model FLOPs a second over all ranks (estimate.py has the formula; what accumulation or
        activation checkpointing computes again does not count), and as a share of the devices'.
        """
        flops = samples_per_second * step_flops(self.stage, self.parts.engine.model.config)
        peak = self.config.telemetry.device_peak_flops
        share = {} if peak is None else {"mfu": flops / (peak * self.parts.group.size)}
        return {"model_flops_per_second": flops, **share}

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


def say(text: str) -> None:
    """Write a line for people."""
    print(text, file=sys.stderr, flush=True)
