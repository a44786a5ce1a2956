"""The trainer: build, loop, step, close.

    outcome = pretrain(config)       # the same call continues a stopped run

Read `pretrain` first, then `Run.step`. The state of a run is its samples seen: data order, masks
and learning rate are functions of it. SIGTERM and SIGUSR1 mean: finish the step, save, stop (exit
75).
"""

from __future__ import annotations

import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist

from configs.load import to_yaml
from configs.publish import publish_text
from curation.manifest import Manifest
from pretrain.bad_samples import BadSamples, check_share, drop_rows_after
from pretrain.build import Parts, build_parts
from pretrain.config import PretrainConfig
from pretrain.data.loader import Batch, batches
from pretrain.resume import ResumePoint, restore, save
from pretrain.schedule import warmup_cosine
from pretrain.telemetry import Telemetry

Stop = Callable[[int], bool]


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


@dataclass
class Run:
    """A run in progress on one rank."""

    config: PretrainConfig
    parts: Parts
    step_number: int
    telemetry: Telemetry | None  # rank 0 alone
    bad_samples: BadSamples
    meter: Meter = field(default_factory=Meter)

    @property
    def samples_seen(self) -> int:
        """Samples of finished steps, over all ranks."""
        return self.step_number * self.config.global_batch_size

    def step(self, batch: Batch) -> None:
        """Encode, compare, update; log where a log interval ends in this step."""
        engine, device = self.parts.engine, self.parts.engine.device
        image, token = batch.image_b3HW.to(device, non_blocking=True), batch.token_bL.to(device)
        kept = None if batch.kept_bK is None else batch.kept_bK.to(device)
        features = engine.forward(image, token, kept)
        loss = self.parts.objective(
            features, similarity=engine.model.similarity, group=self.parts.group
        )
        engine.backward(loss.loss)
        learning_rate = self._learning_rate()
        norm = engine.step(learning_rate)
        self.step_number += 1
        self.meter.steps += 1
        self.bad_samples.note(batch.bad)
        if self._interval_ends(self.config.intervals.log_samples) or self.is_finished():
            self._log([loss.loss, loss.accuracy_i2t, loss.accuracy_t2i], norm, learning_rate)

    def save(self) -> None:
        """Publish a checkpoint; every rank must call it."""
        _, num_bad = self._over_ranks([torch.zeros((), device=self.parts.engine.device)])
        save(self.config, self.parts, ResumePoint(self.step_number, num_bad))

    def is_finished(self) -> bool:
        """Whether the budget is spent."""
        return self.step_number >= self.config.num_steps

    def checkpoint_due(self) -> bool:
        """Whether a checkpoint interval ended in the last step."""
        return self._interval_ends(self.config.intervals.checkpoint_samples)

    def _interval_ends(self, interval: int) -> bool:
        before = self.samples_seen - self.config.global_batch_size
        return before // interval != self.samples_seen // interval

    def _learning_rate(self) -> float:
        batch = self.config.global_batch_size
        return warmup_cosine(
            self.samples_seen,
            peak=self.config.optimizer.learning_rate,
            batch=batch,
            warmup_samples=self.config.optimizer.warmup_samples,
            total_samples=self.config.num_steps * batch,
        )

    def _log(
        self, losses: list[torch.Tensor], norm: torch.Tensor | float, learning_rate: float
    ) -> None:
        meter = self.meter
        (loss, accuracy_i2t, accuracy_t2i), num_bad = self._over_ranks(losses)
        elapsed = time.perf_counter() - meter.started
        rate = meter.steps * self.config.global_batch_size / elapsed
        left = (self.config.num_steps - self.step_number) * self.config.global_batch_size
        row = {
            "step": self.step_number,
            "samples_seen": self.samples_seen,
            "epoch": self.samples_seen / self.parts.manifest.num_samples,
            "loss": loss,
            "accuracy_i2t": accuracy_i2t,
            "accuracy_t2i": accuracy_t2i,
            "samples_per_second": rate,
            "data_wait_fraction": meter.waited / elapsed,
            "gradient_norm": float(norm),
            "logit_scale": float(self.parts.engine.model.clip.logit_scale.detach().exp()),
            "learning_rate": learning_rate,
            "peak_memory_bytes": peak_memory_bytes(),
            "skipped_samples": num_bad,
            "eta_seconds": left / rate,
            "seconds": elapsed,
        }
        self.meter = Meter()
        if self.telemetry is not None:
            self.telemetry.log(row)
        check_share(
            num_bad,
            samples_seen=self.samples_seen,
            limit=self.config.data.max_bad_fraction,
            folder=self.config.output,
        )

    def _over_ranks(self, means: list[torch.Tensor]) -> tuple[list[float], int]:
        """Return the means of `means` over the ranks, and the number of bad samples of all."""
        num_here = torch.tensor(float(self.bad_samples.num_here), device=means[0].device)
        values = torch.stack([*(mean.detach().float() for mean in means), num_here])
        group = self.parts.group
        if group.size > 1:
            dist.all_reduce(values)
        *sums, num_bad = values.tolist()
        return [value / group.size for value in sums], self.bad_samples.num_before + int(num_bad)


def peak_memory_bytes() -> int:
    """Return the peak memory of this process: the device's where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class StopRequest:
    """SIGTERM and SIGUSR1 set a flag; all ranks agree on it after each step."""

    def __init__(self, stop: Stop | None) -> None:
        self._stop = stop
        self._signalled = False
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGUSR1)}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        print(f"{signal.Signals(number).name}: saving after this step", file=sys.stderr, flush=True)

    def agreed(self, step_number: int) -> bool:
        """Return whether any rank was asked to stop; every rank must call it."""
        wanted = self._signalled or (self._stop is not None and self._stop(step_number))
        if dist.get_world_size() == 1:
            return wanted
        flag = torch.tensor([float(wanted)])
        if dist.get_backend() == "nccl":
            flag = flag.cuda()
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def restore_handlers(self) -> None:
        """Give the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def pretrain(config: PretrainConfig, *, stop: Stop | None = None) -> Outcome:
    """Train to the end of the budget, or until asked to stop; continue where a checkpoint is.

    `stop` is asked after each step with the number of finished steps (beside the signals). Raises
    ConfigError, DataError and CheckpointError with what to do.
    """
    parts = build_parts(config)
    run = open_run(config, parts)
    request = StopRequest(stop)
    started, first = time.perf_counter(), run.step_number
    try:
        loop(run, request)
    finally:
        request.restore_handlers()
        if run.telemetry is not None:
            run.telemetry.close()
    seconds = time.perf_counter() - started
    rate = (run.step_number - first) * config.global_batch_size / seconds
    return Outcome(run.is_finished(), run.samples_seen, rate, parts.group.rank == 0)


def open_run(config: PretrainConfig, parts: Parts) -> Run:
    """Restore the newest sound checkpoint, or start at zero; open the log on rank 0."""
    point = restore(config, parts)
    folder, batch = Path(config.output), config.global_batch_size
    telemetry = None
    if parts.group.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        publish_text(folder / "config.yaml", to_yaml(config))
        samples_seen = point.step_number * batch
        drop_rows_after(folder, samples_seen)
        telemetry = Telemetry(
            folder, samples_seen=samples_seen, total_samples=config.num_steps * batch
        )
        print(describe(config, parts.manifest, parts.group.size), file=sys.stderr, flush=True)
    dist.barrier()  # no rank writes before rank 0 has made the folder and cut the logs
    bad_samples = BadSamples(folder, rank=parts.group.rank, num_before=point.num_bad)
    return Run(config, parts, point.step_number, telemetry, bad_samples)


def loop(run: Run, request: StopRequest) -> None:
    """Take steps until the budget is spent or a stop is agreed on.

    Save at intervals and at the end.
    """
    if run.is_finished():
        return
    source = batches(
        run.parts.dataset,
        first=run.step_number,
        last=run.config.num_steps,
        num_workers=run.config.data.num_workers,
    )
    run.meter = Meter()
    while not run.is_finished():
        waiting = time.perf_counter()
        batch = next(source)
        run.meter.waited += time.perf_counter() - waiting
        run.step(batch)
        stopping = request.agreed(run.step_number)
        if stopping or run.checkpoint_due() or run.is_finished():
            run.save()
        if stopping:
            return


def describe(config: PretrainConfig, manifest: Manifest, world_size: int) -> str:
    """Say the arithmetic of a run in words."""
    batch, steps = config.global_batch_size, config.num_steps
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    return (
        f"{config.name}: global batch {batch:,} = {ranks} x {batch // world_size:,} samples; "
        f"{steps:,} steps make {steps * batch:,} samples, "
        f"{steps * batch / manifest.num_samples:.2f} "
        f"passes over the {manifest.num_samples:,} of {config.data.manifest}; "
        f"mask ratio {config.reduction.mask_ratio:g}; ZeRO stage {config.engine.zero_stage}, "
        f"{config.engine.precision}"
    )
