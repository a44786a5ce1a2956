"""Pretraining on a real Slurm of two nodes: equal to the run without it, whatever happens to it.

A start costs ten seconds of imports a rank. The undisturbed job, its preflight and the runs under
other launchers pay them; the ranks of the other jobs are forked from a warm process (stand_in.py).
What can run beside each other does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.load import to_yaml
from tests import warm
from tests.pretrain.conftest import TINY_MODEL, make_config, make_dataset
from tests.pretrain.test_train import equal, rows, weights
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SCRIPTS, VARIABLES
from tests.slurm.stand_in import ADDRESS
from tests.slurm.warm_ranks import find_ranks

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.slurm]

SCRIPT = str(SCRIPTS / "pretrain.sbatch")
NUM_STEPS, BATCH = 80, 16
TWO = ("--nodes=2", "--nodelist=n[1-2]")
ENDLESS = 100_000  # steps of a run that is stopped
PATIENCE = 600.0  # seconds; a busy machine is slow


class Runs:
    """Runs of one configuration, each in its folder below `folder`."""

    torn: str  # jobs that the fixture has submitted
    plain: str
    thawing: threading.Thread
    torchrun: subprocess.Popen[str]
    deepspeed: subprocess.Popen[str]

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.manifest = make_dataset(folder / "data", [30, 7, 25, 1, 33])
        self.model = folder / "tiny.json"
        self.model.write_text(json.dumps(TINY_MODEL))
        self._python = folder / "python"
        self._python.write_text(
            f'#!/bin/sh\nexec {sys.executable} -m tests.slurm.stand_in "$0" "$@"\n'
        )
        self._python.chmod(0o755)
        self._socket = str(cluster.folder / "warm")
        self._warm = warm.start("tests.slurm.warm_ranks", [self._socket])
        self._processes: list[subprocess.Popen[str] | warm.WarmProcess] = [self._warm]
        cluster.until(Path(self._socket).exists, "warm process", PATIENCE)

    def config(self, name: str, num_steps: int = NUM_STEPS) -> str:
        """Write the configuration of a run; return its path."""
        config = make_config(
            self.manifest,
            self.model,
            self.folder / name,
            engine={"zero_stage": 1, "num_threads": 1},
            samples=num_steps * BATCH,
            intervals={"log_samples": BATCH, "checkpoint_samples": 10 * BATCH},
        )
        path = self.folder / f"{name}.yaml"
        path.write_text(to_yaml(config))
        return str(path)

    def submit(self, config: str, *flags: str, **variables: str) -> str:
        """Submit a run of one process a node; return the job."""
        words = ["--cpus-per-task=1", *flags, SCRIPT, config]
        return self.cluster.sbatch(*words, cwd=self.folder, variables=VARIABLES | variables)

    def submit_warm(self, config: str, *flags: str, **variables: str) -> str:
        """Submit a run whose ranks are warm, without preflight."""
        quick = {"PAIRMILL_PYTHON": str(self._python), ADDRESS: self._socket}
        return self.submit(config, *flags, PAIRMILL_PREFLIGHT="off", **quick, **variables)

    def log(self, job: str) -> str:
        return (self.folder / f"pretrain-{job}.log").read_text()

    def steps(self, name: str) -> int:
        metrics = self.folder / name / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def await_steps(self, name: str, number: int) -> None:
        """Wait until a run has logged so many steps."""
        self.cluster.until(lambda: self.steps(name) >= number, f"step {number}", PATIENCE)

    def latest(self, name: str) -> int:
        """Return the number of samples of a run's newest checkpoint."""
        latest = self.folder / name / "checkpoints/latest"
        return int(latest.read_text().strip().removeprefix("samples-")) if latest.exists() else 0

    def await_restart(self, job: str, number: int) -> None:
        """Wait until a job was requeued so often; its next start has time enough."""
        cluster = self.cluster
        cluster.until(lambda: cluster.job(job).restarts == number, f"restart {number}", PATIENCE)
        cluster.check("scontrol", "update", f"JobId={job}", "TimeLimit=60")

    def ranks(self, job: str, rank: int | str = "") -> list[int]:
        """Return the processes of a job's warm ranks, or of one of them."""
        return find_ranks(self._warm.pid, job, rank)

    def freeze(self, job: str) -> None:
        for rank in self.ranks(job):
            os.kill(rank, signal.SIGSTOP)

    def thaw(self, job: str) -> None:
        for rank in self.ranks(job):
            os.kill(rank, signal.SIGCONT)

    def thaw_at_limit(self, job: str) -> threading.Thread:
        """Start to wait for the signal before the limit: with it the ranks go on, and save."""

        def wait() -> None:
            self.cluster.until(lambda: "got SIGUSR1" in self.log(job), "signal", PATIENCE)
            self.thaw(job)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        return thread

    def launch(self, name: str, *launcher: str) -> subprocess.Popen[str]:
        """Start a run of two processes without Slurm."""
        words = [*launcher, "pretrain", self.config(name)]
        environment = {**os.environ, **VARIABLES, "TMPDIR": "/tmp", "CUDA_VISIBLE_DEVICES": ""}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        log = (self.folder / f"{name}.log").open("w")
        process = subprocess.Popen(
            words, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True
        )
        self._processes.append(process)
        return process

    def without_slurm(self) -> Path:
        """Return the folder of the uninterrupted run under torchrun, after its end."""
        assert self.torchrun.wait(PATIENCE) == 0, (self.folder / "torchrun.log").read_text()
        return self.folder / "torchrun"

    def close(self) -> None:
        for process in self._processes:
            process.kill()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory) -> Iterator[Runs]:
    """Started: `torn`, which waits, frozen, for its time limit; `plain`; two without Slurm."""
    runs = Runs(tmp_path_factory.mktemp("runs"), cluster)
    limit = ["--time=2", "--signal=B:USR1@60"]
    runs.torn = runs.submit_warm(runs.config("torn"), "--nodes=2", "--nodelist=n[3-4]", *limit)
    torchrun = ["torchrun", "--nproc-per-node=2", f"--master-port={free_port()}", "-m", "tools.cli"]
    runs.torchrun = runs.launch("torchrun", *torchrun)
    runs.await_steps("torn", 5)
    runs.freeze(runs.torn)
    runs.thawing = runs.thaw_at_limit(runs.torn)
    runs.plain = runs.submit(runs.config("plain"), *TWO)
    deepspeed = ["deepspeed", "--num_gpus=2", f"--master_port={free_port()}", "--no_local_rank"]
    runs.deepspeed = runs.launch("deepspeed", *deepspeed, "--module", "tools.cli")
    yield runs
    runs.close()


def test_a_killed_rank_ends_the_others_and_the_job_with_its_exit_code(runs):
    job = runs.submit_warm(runs.config("killed", ENDLESS), *TWO)
    runs.await_steps("killed", 3)
    (rank,) = runs.ranks(job, 1)
    os.kill(rank, signal.SIGKILL)
    ended = runs.cluster.wait(job, PATIENCE)
    log = runs.log(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 137, 0), log
    assert "failed with exit code 137 (n2: local rank 0 was ended by SIGKILL)" in log
    runs.cluster.until(
        lambda: not runs.cluster.processes(job) + runs.ranks(job), "end of all processes"
    )


def test_scancel_saves_and_cancels_and_the_last_requeue_is_the_last(runs):
    cancelled = runs.submit_warm(runs.config("cancelled", ENDLESS), "--nodelist=n1")
    last = {"PAIRMILL_MAX_REQUEUES": "0"}
    limited = runs.submit_warm(runs.config("limited", ENDLESS), "--nodelist=n1", **last)
    runs.await_steps("cancelled", 3)
    runs.cluster.check("scancel", cancelled)
    runs.await_steps("limited", 3)
    runs.cluster.check("scancel", "--signal=USR1", limited)  # the ranks alone, not the script

    ended = runs.cluster.wait(cancelled, PATIENCE)
    log = runs.log(cancelled)
    assert (ended.state, ended.restarts) == ("CANCELLED", 0), log
    assert runs.latest("cancelled") >= 3 * BATCH, log

    ended = runs.cluster.wait(limited, PATIENCE)
    log = runs.log(limited)
    assert (ended.state, ended.exit_code) == ("FAILED", 75), log
    assert "not requeued, as all PAIRMILL_MAX_REQUEUES=0 are used up" in log
    assert runs.latest("limited") >= 3 * BATCH, log


def test_a_run_that_meets_its_limit_a_requeue_and_a_dead_node_equals_the_uninterrupted_one(runs):
    cluster, name, job = runs.cluster, "torn", runs.torn
    # Slurm looks at the limits every 30 seconds: its own signal came 30 to 60 after the start.
    runs.thawing.join(PATIENCE)
    runs.await_restart(job, 1)
    first = runs.latest(name)
    assert 5 * BATCH <= first < NUM_STEPS * BATCH, runs.log(job)
    cluster.until(lambda: cluster.release(job), "requeued job", PATIENCE)

    cluster.until(lambda: runs.latest(name) > first, "another checkpoint", PATIENCE)
    runs.freeze(job)
    cluster.check("scontrol", "requeue", job)
    runs.thaw(job)
    runs.await_restart(job, 2)
    cluster.until(lambda: cluster.release(job), "requeued job", PATIENCE)
    second = runs.latest(name)  # Slurm sends SIGTERM first, so that there was time to save
    assert first < second < NUM_STEPS * BATCH, runs.log(job)

    cluster.until(lambda: runs.latest(name) > second, "a third checkpoint", PATIENCE)
    runs.freeze(job)
    cluster.tell_machine("cut", "n4")
    runs.thaw(job)
    runs.await_restart(job, 3)
    assert runs.latest(name) < NUM_STEPS * BATCH, "it had finished before the node died"
    cluster.tell_machine("start", "n4")

    ended = cluster.wait(job, PATIENCE)
    log = runs.log(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 3), log
    assert "DUE TO TIME LIMIT" not in log
    assert "DUE TO NODE FAILURE" in log
    assert equal(weights(runs.folder / name), weights(runs.without_slurm()))
    assert rows(runs.folder / name) == rows(runs.without_slurm())
    assert list(runs.folder.glob(".exit-*")) == []


def test_two_nodes_end_with_the_weights_of_the_run_without_slurm(runs):
    ended = runs.cluster.wait(runs.plain, PATIENCE)
    log = runs.log(runs.plain)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 0), log
    assert equal(weights(runs.folder / "plain"), weights(runs.without_slurm()))
    assert rows(runs.folder / "plain") == rows(runs.without_slurm())
    assert "preflight: n1: well" in log
    assert "preflight: n2: well" in log
    assert "global batch 16 = 2 nodes x 1 rank x 8 samples" in log


def test_the_deepspeed_launcher_gives_the_same_run(runs):
    assert runs.deepspeed.wait(PATIENCE) == 0, (runs.folder / "deepspeed.log").read_text()
    assert equal(weights(runs.folder / "deepspeed"), weights(runs.without_slurm()))
