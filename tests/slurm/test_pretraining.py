"""Pretraining on a real Slurm of two nodes: equal to the run without it, whatever happens to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.load import to_yaml
from tests.pretrain.conftest import TINY_MODEL, make_config, make_dataset
from tests.pretrain.test_train import equal, rows, weights
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SCRIPTS, VARIABLES

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.slurm]

SCRIPT = str(SCRIPTS / "pretrain.sbatch")
NUM_STEPS, BATCH = 200, 16
PATIENCE = 600.0  # seconds; a busy machine is slow


class Runs:
    """Runs of one configuration, each in its folder below `folder`."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.manifest = make_dataset(folder / "data", [30, 7, 25, 1, 33])
        self.model = folder / "tiny.json"
        self.model.write_text(json.dumps(TINY_MODEL))

    def config(self, name: str) -> str:
        """Write the configuration of a run; return its path."""
        config = make_config(
            self.manifest,
            self.model,
            self.folder / name,
            engine={"zero_stage": 1, "num_threads": 1},
            samples=NUM_STEPS * BATCH,
            intervals={"log_samples": BATCH, "checkpoint_samples": 40 * BATCH},
        )
        path = self.folder / f"{name}.yaml"
        path.write_text(to_yaml(config))
        return str(path)

    def submit(self, name: str, *flags: str, **variables: str) -> str:
        """Submit a run of one process a node; return the job."""
        words = ["--cpus-per-task=1", *flags, SCRIPT, self.config(name)]
        return self.cluster.sbatch(*words, cwd=self.folder, variables=VARIABLES | variables)

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

    def launch(self, name: str, *launcher: str) -> subprocess.Popen[str]:
        """Start a run of two processes without Slurm."""
        words = [*launcher, "pretrain", self.config(name)]
        environment = {**os.environ, **VARIABLES, "TMPDIR": "/tmp", "CUDA_VISIBLE_DEVICES": ""}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        log = (self.folder / f"{name}.log").open("w")
        return subprocess.Popen(
            words, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True
        )


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def runs(cluster, tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), cluster)


@pytest.fixture(scope="module")
def without_slurm(runs):
    """The folder of the uninterrupted run under torchrun."""
    words = ["torchrun", "--nproc-per-node=2", f"--master-port={free_port()}", "-m", "tools.cli"]
    process = runs.launch("torchrun", *words)
    assert process.wait(PATIENCE) == 0, (runs.folder / "torchrun.log").read_text()
    return runs.folder / "torchrun"


def test_two_nodes_end_with_the_weights_of_the_run_without_slurm(runs, without_slurm):
    job = runs.submit("plain", "--nodes=2")
    ended = runs.cluster.wait(job, PATIENCE)
    log = runs.log(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 0), log
    assert equal(weights(runs.folder / "plain"), weights(without_slurm))
    assert rows(runs.folder / "plain") == rows(without_slurm)
    assert "preflight: n1: well" in log
    assert "preflight: n2: well" in log
    assert "global batch 16 = 2 nodes x 1 rank x 8 samples" in log
    assert list(runs.folder.glob(".exit-*")) == []


def test_the_deepspeed_launcher_gives_the_same_run(runs, without_slurm):
    words = ["deepspeed", "--num_gpus=2", f"--master_port={free_port()}", "--no_local_rank"]
    process = runs.launch("deepspeed", *words, "--module", "tools.cli")
    assert process.wait(PATIENCE) == 0, (runs.folder / "deepspeed.log").read_text()
    assert equal(weights(runs.folder / "deepspeed"), weights(without_slurm))


def test_a_run_that_meets_its_limit_a_requeue_and_a_dead_node_equals_the_uninterrupted_one(
    runs, without_slurm
):
    cluster, name = runs.cluster, "torn"
    job = runs.submit(name, "--nodes=2", PAIRMILL_PREFLIGHT="off")

    def await_restart(number: int) -> None:
        cluster.until(lambda: cluster.job(job).restarts == number, f"restart {number}", PATIENCE)

    runs.await_steps(name, 10)
    cluster.check("scancel", "--signal=USR1", "--batch", job)  # what --signal=B:USR1@180 sends
    await_restart(1)
    first = runs.latest(name)
    assert 10 * BATCH <= first < NUM_STEPS * BATCH, runs.log(job)
    cluster.until(lambda: cluster.release(job), "requeued job", PATIENCE)

    cluster.until(lambda: runs.latest(name) > first, "another checkpoint", PATIENCE)
    cluster.check("scontrol", "requeue", job)
    await_restart(2)
    cluster.until(lambda: cluster.release(job), "requeued job", PATIENCE)
    second = runs.latest(name)  # Slurm sends SIGTERM first, so that there was time to save
    assert second < NUM_STEPS * BATCH, runs.log(job)

    cluster.until(lambda: runs.latest(name) > second, "a third checkpoint", PATIENCE)
    cluster.tell_machine("cut", "n2")
    await_restart(3)
    assert runs.latest(name) < NUM_STEPS * BATCH, "it had finished before the node died"
    cluster.tell_machine("start", "n2")

    ended = cluster.wait(job, PATIENCE)
    log = runs.log(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 3), log
    assert "got SIGUSR1" in log
    assert "DUE TO NODE FAILURE" in log
    assert equal(weights(runs.folder / name), weights(without_slurm))
    assert rows(runs.folder / name) == rows(without_slurm)
    assert list(runs.folder.glob(".exit-*")) == []


def test_a_killed_rank_ends_the_others_and_the_job_with_its_exit_code(runs):
    job = runs.submit("killed", "--nodes=2", PAIRMILL_PREFLIGHT="off")
    runs.await_steps("killed", 3)
    (rank,) = (
        pid
        for pid in runs.cluster.processes(job, RANK="1")
        if b"tools.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(rank, 9)
    ended = runs.cluster.wait(job, PATIENCE)
    log = runs.log(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("FAILED", 137, 0), log
    assert "failed with exit code 137 (n2: local rank 0 was ended by SIGKILL)" in log
    runs.cluster.until(lambda: not runs.cluster.processes(job), "end of all processes")


def test_scancel_saves_and_cancels_and_the_last_requeue_is_the_last(runs):
    quick = {"PAIRMILL_PREFLIGHT": "off"}
    cancelled = runs.submit("cancelled", "--nodes=1", **quick)
    limited = runs.submit("limited", "--nodes=1", PAIRMILL_MAX_REQUEUES="0", **quick)
    runs.await_steps("cancelled", 3)
    runs.cluster.check("scancel", cancelled)
    runs.await_steps("limited", 3)
    runs.cluster.check("scancel", "--signal=USR1", limited)  # the ranks alone, not the script
    jobs = SimpleNamespace(
        cancelled=runs.cluster.wait(cancelled, PATIENCE),
        limited=runs.cluster.wait(limited, PATIENCE),
    )
    log = runs.log(cancelled)
    assert (jobs.cancelled.state, jobs.cancelled.restarts) == ("CANCELLED", 0), log
    assert runs.latest("cancelled") >= 3 * BATCH, log
    log = runs.log(limited)
    assert (jobs.limited.state, jobs.limited.exit_code) == ("FAILED", 75), log
    assert "not requeued, as all PAIRMILL_MAX_REQUEUES=0 are used up" in log
    assert runs.latest("limited") >= 3 * BATCH, log
