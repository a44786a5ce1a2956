"""Curation over the nodes of a real Slurm: the bytes of the laptop, also when nodes die.

All runs go on at once: while one waits for Ray to miss a node the others compute.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.curation.conftest import hashes, sample, write_tar
from tests.slurm.conftest import SCRIPTS, VARIABLES

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.slurm]

PATIENCE = 600.0
NUM_SHARDS, SAMPLES = 60, 50


class Pool:
    """A pool and jobs over it, each writing below its own folder."""

    torn: str  # jobs that the fixture has submitted
    two: str
    laptop: subprocess.Popen[str]
    vanished: float  # when n5 did
    num_indexes_then: int

    def __init__(self, folder: Path, cluster) -> None:
        self.folder, self.cluster = folder, cluster
        for number in range(NUM_SHARDS):
            members = []
            for i in range(SAMPLES):
                n = number * SAMPLES + i
                caption = "x" if n % 10 == 3 else f"a thing of kind {n % 12}"
                side = 8 if n % 10 == 5 else 160
                members += sample(f"{i:04d}", caption, side=side, shade=n % 256)
            write_tar(folder / "pool" / f"{number:05d}.tar", members)

    def config(self, name: str) -> str:
        rules = [
            {"name": "decodable"},
            {"name": "caption_length", "min_words": 2},
            {"name": "image_size", "min_side": 16},
            {"name": "caption_count", "max_count": 200},
        ]
        tree = {
            "name": "test",
            "seed": 7,
            "output": str(self.folder / name / "dataset"),
            "index_dir": str(self.folder / name / "indexes"),
            "sources": [{"name": "pool", "shards": str(self.folder / "pool")}],
            "rules": rules,
            "write": {"samples_per_shard": 100, "shards_per_block": 4},
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return str(path)

    def submit(self, name: str, *flags: str, **variables: str) -> str:
        words = ["--cpus-per-task=1", *flags, str(SCRIPTS / "curate.sbatch"), self.config(name)]
        return self.cluster.sbatch(*words, cwd=self.folder, variables=VARIABLES | variables)

    def start_laptop(self) -> subprocess.Popen[str]:
        """Start the run without Slurm."""
        words = ["curate", self.config("laptop"), "engine.num_workers=1"]
        return subprocess.Popen(
            [sys.executable, "-m", "tools.cli", *words],
            env={**os.environ, **VARIABLES, "TMPDIR": "/tmp"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def expected(self) -> dict[str, str]:
        """Return the files of the laptop's run, after its end."""
        code = self.laptop.wait(PATIENCE)
        assert code == 0, self.laptop.stdout.read()
        files = self.dataset("laptop")
        assert sum(name.endswith(".tar") for name in files) > 5
        return files

    def log(self, job: str) -> str:
        return (self.folder / f"curate-{job}.log").read_text()

    def dataset(self, name: str) -> dict[str, str]:
        return hashes(self.folder / name / "dataset")

    def num_indexes(self, name: str) -> int:
        return len(list((self.folder / name / "indexes").rglob("*.parquet")))


@pytest.fixture(scope="module")
def pool(cluster, tmp_path_factory) -> Iterator[Pool]:
    """Started: `torn`, whose n4 has crashed and whose n5 has vanished; `two`; the laptop's run."""
    pool = Pool(tmp_path_factory.mktemp("curation"), cluster)
    pool.torn = pool.submit("torn", "--nodes=3", "--nodelist=n[3-5]", PAIRMILL_PREFLIGHT="off")
    cluster.until(lambda: pool.num_indexes("torn") >= 5, "indexes", PATIENCE)
    cluster.tell_machine("crash", "n4")  # its kernel says goodbye to whom it spoke with
    cluster.tell_machine("cut", "n5")  # nobody is told
    pool.num_indexes_then, pool.vanished = pool.num_indexes("torn"), time.monotonic()
    pool.two = pool.submit("two", "--nodes=2", "--nodelist=n[1-2]")
    pool.laptop = pool.start_laptop()
    yield pool
    pool.laptop.kill()
    for node in ("n4", "n5"):
        cluster.tell_machine("start", node)


def test_a_node_that_crashes_and_one_that_vanishes_change_nothing(pool):
    assert pool.num_indexes_then < NUM_SHARDS, "it had scanned everything before the nodes died"
    missed = "address: 10.77.0.5 and node name: 10.77.0.5 has been marked dead because the detector"
    pool.cluster.until(lambda: missed in pool.log(pool.torn), "lost node", PATIENCE)
    assert time.monotonic() - pool.vanished < 60
    ended = pool.cluster.wait(pool.torn, PATIENCE)
    log = pool.log(pool.torn)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 0), log
    assert "Ray: 3 of 3 nodes" in log
    assert pool.dataset("torn") == pool.expected()


def test_two_nodes_give_the_bytes_of_the_laptop(pool):
    ended = pool.cluster.wait(pool.two, PATIENCE)
    log = pool.log(pool.two)
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), log
    assert "Ray: 2 of 2 nodes" in log
    assert "preflight: n2: well" in log
    assert pool.dataset("two") == pool.expected()
    pool.cluster.until(lambda: not pool.cluster.processes(pool.two), "end of all processes")
    left = pool.cluster.check("srun", "--nodes=2", "--nodelist=n[1-2]", "ls", "/mnt")
    assert "ray-" not in left, "Ray left its files"
