"""Curation over the nodes of a real Slurm: the bytes of the laptop, also when a node dies."""

from __future__ import annotations

import os
import subprocess
import sys
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

    def submit(self, name: str, **variables: str) -> str:
        words = ["--nodes=2", "--cpus-per-task=2", str(SCRIPTS / "curate.sbatch")]
        return self.cluster.sbatch(
            *words, self.config(name), cwd=self.folder, variables=VARIABLES | variables
        )

    def log(self, job: str) -> str:
        return (self.folder / f"curate-{job}.log").read_text()

    def dataset(self, name: str) -> dict[str, str]:
        return hashes(self.folder / name / "dataset")

    def num_indexes(self, name: str) -> int:
        return len(list((self.folder / name / "indexes").rglob("*.parquet")))


@pytest.fixture(scope="module")
def pool(cluster, tmp_path_factory) -> Pool:
    return Pool(tmp_path_factory.mktemp("curation"), cluster)


@pytest.fixture(scope="module")
def laptop(pool) -> dict[str, str]:
    """The files of the run without Slurm."""
    words = [
        sys.executable,
        "-m",
        "tools.cli",
        "curate",
        pool.config("laptop"),
        "engine.num_workers=2",
    ]
    done = subprocess.run(
        words,
        env={**os.environ, **VARIABLES, "TMPDIR": "/tmp"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = pool.dataset("laptop")
    assert sum(name.endswith(".tar") for name in files) > 5
    return files


def test_two_nodes_give_the_bytes_of_the_laptop(pool, laptop):
    job = pool.submit("two")
    ended = pool.cluster.wait(job, PATIENCE)
    log = pool.log(job)
    assert (ended.state, ended.exit_code) == ("COMPLETED", 0), log
    assert "Ray: 2 of 2 nodes" in log
    assert "preflight: n2: well" in log
    assert pool.dataset("two") == laptop
    pool.cluster.until(lambda: not pool.cluster.processes(job), "end of all processes")
    assert pool.cluster.check("srun", "--nodes=2", "ls", "/mnt") == "", "Ray left its files"


def test_a_worker_node_that_dies_in_the_middle_changes_nothing(pool, laptop):
    job = pool.submit("torn", PAIRMILL_PREFLIGHT="off")
    pool.cluster.until(lambda: pool.num_indexes("torn") >= 5, "indexes", PATIENCE)
    pool.cluster.tell_machine("crash", "n2")
    done = pool.num_indexes("torn")
    ended = pool.cluster.wait(job, PATIENCE)
    pool.cluster.tell_machine("start", "n2")
    log = pool.log(job)
    assert (ended.state, ended.exit_code, ended.restarts) == ("COMPLETED", 0, 0), log
    assert done < NUM_SHARDS, "it had scanned everything before the node died"
    assert "Ray: 2 of 2 nodes" in log
    assert pool.dataset("torn") == laptop
