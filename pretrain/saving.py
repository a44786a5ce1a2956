"""Save a run while it goes on: a snapshot on the host, then threads that write and publish.

    Saver.save(point)     every rank: copy what it owns to the host, then train on
      each rank's thread  write state-RANK.safetensors, flush it, report its digest in a file
      rank 0's thread     wait for all reports, write model/ and model_ema/ out of the state files,
                          seal, rename, point `latest`, remove what is superseded, copy to remote
    Saver.wait()          every rank: until that is done; returns what went wrong

Only one checkpoint is written at a time. A save that fails leaves nothing behind; training goes on
with a warning, and the next interval tries again. Where it was the last one, that is an error.
"""

from __future__ import annotations

import copy
import json
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from configs.errors import CheckpointError
from configs.load import digest, to_yaml
from configs.publish import publish_folder, publish_text, remove_leftovers
from pretrain import checkpoint
from pretrain.build import Parts
from pretrain.config import PretrainConfig
from pretrain.model.clip import ClipModel
from pretrain.objectives.group import Group
from pretrain.ranks import host_group, on_first_rank
from pretrain.remote_checkpoints import Mirror
from pretrain.training_state import Snapshot, whole_weights

_POLL_SECONDS = 0.01
RUN_STATE = "run_state.json"


class ResumePoint(NamedTuple):
    """Where a run stands: finished steps, bad samples replaced on all ranks, and the ranges of
    positions in the order of data that are never visited.
    """

    step_number: int
    num_bad: int
    skipped_ranges: tuple[tuple[int, int], ...] = ()


class Saver:
    """The checkpoints of a run on one rank."""

    def __init__(self, config: PretrainConfig, group: Group) -> None:
        self._config, self._group = config, group
        self._folder = Path(config.output) / "checkpoints"
        self._snapshot = Snapshot()
        self._writer: _Thread | None = None
        self._publisher: _Thread | None = None  # rank 0 alone
        self._abort = threading.Event()
        remote = config.checkpoint.remote
        is_first = group.rank == 0
        self._mirror = Mirror(remote, config.intervals) if remote and is_first else None
        self.stall_seconds = 0.0  # that training stood still since it was last asked

    def save(
        self, parts: Parts, point: ResumePoint, *, step_seconds: float | None = None
    ) -> str | None:
        """Take a snapshot and have it written; every rank must call it. `step_seconds` is what a
        step takes, for the log.

        Returns what went wrong with the checkpoint before, or with starting this one.
        """
        started = time.perf_counter()
        failure = self.wait()
        samples_seen = parts.stage.samples_at(point.step_number)
        name = checkpoint.folder_name(samples_seen)
        temporary = self._folder / f".{name}.tmp-saving"
        problem = on_first_rank(lambda: _made(self._folder, temporary))
        if problem is None:
            self._take(parts, temporary, point, started, step_seconds)
        self.stall_seconds += time.perf_counter() - started
        return failure or problem

    @property
    def is_writing(self) -> bool:
        """Whether the snapshot that `save` took has not been waited for."""
        return self._writer is not None

    def _take(
        self,
        parts: Parts,
        temporary: Path,
        point: ResumePoint,
        started: float,
        step_seconds: float | None,
    ) -> None:
        rank, samples_seen = self._group.rank, parts.stage.samples_at(point.step_number)
        engine_folder = temporary / checkpoint.ENGINE_FOLDER
        self._snapshot.take(parts.engine.partitions, parts.ema, parts.mean_tower)
        if rank == 0:
            job = _Publication(
                folder=self._folder,
                temporary=temporary,
                name=checkpoint.folder_name(samples_seen),
                num_ranks=self._group.size,
                record=run_record(self._config, parts, point, samples_seen),
                run_state=parts.engine.extra_state(),
                config_yaml=to_yaml(self._config),
                model=copy.copy(parts.engine.model),  # a later stage may have another
                parts=parts,
                config=self._config,
                copying=self._mirror.copying if self._mirror is not None else (),
            )
            self._abort.clear()
            stall = time.perf_counter() - started
            stood = f"training stood still for {stall * 1e3:,.1f} ms"
            if step_seconds:
                stood += f", {stall / step_seconds:.0%} of a step"
            self._publisher = _Thread(lambda: self._publish(job, stood))
        self._writer = _Thread(lambda: _write(self._snapshot, engine_folder, rank))

    def _publish(self, job: _Publication, stood: str) -> None:
        started = time.perf_counter()
        try:
            size = job.run(self._abort)
        except BaseException:
            shutil.rmtree(job.temporary, ignore_errors=True)
            raise
        seconds = time.perf_counter() - started
        print(
            f"saved {self._folder / job.name}: {size / 2**20:,.1f} MiB in {seconds:.2f} s in the "
            f"background; {stood}",
            file=sys.stderr,
            flush=True,
        )
        if self._mirror is not None:
            self._mirror.push(self._folder)

    def wait(self) -> str | None:
        """Wait until nothing is being written; every rank must call it, and gets the same answer.

        Returns None, or why the last checkpoint could not be saved.
        """
        problem = self._writer.wait() if self._writer is not None else None
        problems: list[str | None] = [problem]
        if self._group.size > 1:
            problems = [None] * self._group.size
            dist.all_gather_object(problems, problem, group=host_group())
        if any(problems):
            self._abort.set()  # a rank whose disk is full may not have been able to report it
        published = self._publisher.wait() if self._publisher is not None else None
        self._writer = self._publisher = None
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(problems) if text]
        return on_first_rank(lambda: "; ".join(failed) or published)

    def finish(self) -> None:
        """Wait for the last checkpoint and its remote copy; raise CheckpointError on every rank
        where it could not be saved.
        """
        failure = self.wait()
        if failure is not None:
            raise CheckpointError(
                f"the last checkpoint could not be saved to {self._folder}: {failure}. The one "
                "before it stands; mend that, and the same line continues from there."
            )
        on_first_rank(lambda: self._mirror.wait() if self._mirror is not None else None)


class _Thread:
    """Runs a function in the background; `wait` returns its error as text."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._problem: str | None = None
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._function()
        except Exception as error:  # whatever it is, training must hear of it
            self._problem = describe_error(error)

    def wait(self) -> str | None:
        self._thread.join()
        return self._problem


def describe_error(error: Exception) -> str:
    """Return an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename or 'no file'})"
    return f"{type(error).__name__}: {error}"


def _made(folder: Path, temporary: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        (temporary / checkpoint.ENGINE_FOLDER).mkdir(parents=True)
    except OSError as error:
        return describe_error(error)
    return None


def _report(engine_folder: Path, rank: int) -> Path:
    return engine_folder / f"report-{rank:05d}.json"


def _write(snapshot: Snapshot, engine_folder: Path, rank: int) -> None:
    try:
        written = snapshot.write(engine_folder, rank)
        publish_text(_report(engine_folder, rank), json.dumps(written))
    except BaseException:
        for path in engine_folder.glob(f"*-{rank:05d}.*"):  # make room, if that is the problem
            path.unlink(missing_ok=True)
        raise


class _Publication(NamedTuple):
    """What rank 0 makes of the ranks' state files."""

    folder: Path
    temporary: Path
    name: str
    num_ranks: int
    record: dict[str, Any]
    run_state: dict[str, Any]
    config_yaml: str
    model: ClipModel
    parts: Parts
    config: PretrainConfig
    copying: Collection[str]  # to the remote storage, while this runs

    def run(self, abort: threading.Event) -> int:
        """Publish the checkpoint; return its bytes. Raises CheckpointError where told to stop."""
        engine_folder = self.temporary / checkpoint.ENGINE_FOLDER
        digests = self._collect(engine_folder, abort)
        self._export(engine_folder, checkpoint.MODEL_FOLDER, averaged=False)
        if self.parts.ema is not None:
            self._export(engine_folder, checkpoint.EMA_FOLDER, averaged=True)
        text = json.dumps(self.run_state)
        (engine_folder / RUN_STATE).write_text(text, encoding="utf-8")
        (self.temporary / "config.yaml").write_text(self.config_yaml, encoding="utf-8")
        checkpoint.seal(self.temporary, self.record, digests)
        final = self.folder / self.name
        if final.exists():  # a damaged one that the run was restarted before
            checkpoint.remove_checkpoint(final)
        publish_folder(self.temporary, final)
        checkpoint.publish_latest(self.folder, self.name)
        remove_superseded(self.folder, self.config, but=self.copying)
        return sum(path.stat().st_size for path in final.rglob("*") if path.is_file())

    def _collect(self, engine_folder: Path, abort: threading.Event) -> dict[str, str]:
        """Wait for the reports of all ranks; return the digests of their files."""
        digests = {}
        for rank in range(self.num_ranks):
            report = _report(engine_folder, rank)
            while not report.exists():
                if abort.wait(_POLL_SECONDS):
                    raise CheckpointError("a rank could not write its part")
            state = checkpoint.ENGINE_FOLDER + f"/state-{rank:05d}.safetensors"
            digests[state] = json.loads(report.read_text(encoding="utf-8"))
            report.unlink()
        return digests

    def _export(self, engine_folder: Path, name: str, *, averaged: bool) -> None:
        folder = self.temporary / name
        folder.mkdir()
        self.model.save(folder, whole_weights(engine_folder, averaged=averaged))
        self.parts.tokenizer.save(folder)


def remove_superseded(folder: Path, config: PretrainConfig, *, but: Collection[str] = ()) -> None:
    """Remove the checkpoints that the run's intervals do not keep, and `but` does not name."""
    names = [path.name for path in checkpoint.usable_checkpoints(folder)]
    intervals = config.intervals
    keep, every = intervals.keep_checkpoints, intervals.keep_every_samples
    for name in checkpoint.superseded(names, keep=keep, keep_every=every):
        if name not in but:
            checkpoint.remove_checkpoint(folder / name)


def run_record(
    config: PretrainConfig, parts: Parts, point: ResumePoint, samples_seen: int
) -> dict[str, Any]:
    """Return the fields of checkpoint.json."""
    return {
        "samples_seen": samples_seen,
        "step": point.step_number,
        "skipped_samples": point.num_bad,
        "skipped_ranges": point.skipped_ranges,
        "config_digest": digest(config),
        "manifest_digest": parts.data.digest,
        "world_size": parts.group.size,
        "threads": torch.get_num_threads(),
        "zero_stage": parts.stage.config.engine.zero_stage,
        "device": device_name(parts.engine.device),
        "versions": versions(),
    }


def device_name(device: torch.device) -> str:
    """Return what computes: `cpu` with its instruction set, or the name of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    packages = ("torch", "deepspeed", "open_clip_torch", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}
