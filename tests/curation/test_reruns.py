"""What a second run finds: killed runs, changed inputs, moved sources, files of others."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from configs.errors import DataError, UsageError
from configs.load import to_yaml
from curation.job import curate
from curation.manifest import read_index

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def ray_address() -> str:
    import ray

    return ray.get_runtime_context().gcs_address


def to_tree(config):
    return yaml.safe_load(to_yaml(config))


def test_killed_at_any_moment_and_rerun_gives_the_same_bytes(finished, job, tars, tmp_path):
    seed = int(os.environ.get("PAIRMILL_TEST_SEED") or random.randrange(10**6))
    print(f"PAIRMILL_TEST_SEED={seed}")
    rng = random.Random(seed)
    config = job()
    last = f"{len(list(Path(finished[0].output).glob('*.tar'))) - 1:05d}.index.parquet"
    # A file of each stage; the last one comes just before the manifest.
    early = ["indexes/pool/*.parquet", "dataset.work/decisions/pool/*.parquet"]
    late = ["dataset.work/plan-*/block-*.arrow", "dataset/*.tar", f"dataset/{last}"]
    moments = [rng.choice(early), *sorted(rng.sample(late, 2), key=late.index)]
    codes = [kill_when(config, tmp_path, moment, rng.uniform(0, 0.02)) for moment in moments]
    assert set(codes) <= {0, -signal.SIGKILL}  # 0: it was done before the signal came
    assert codes[0] == -signal.SIGKILL
    curate(config)
    assert tars.hashes(Path(config.output)) == tars.hashes(Path(finished[0].output))


def kill_when(config, folder: Path, pattern: str, delay_seconds: float) -> int:
    """Run a job in a process of its own, killed once a file is there; return its exit code."""
    path = folder / "job.yaml"
    path.write_text(to_yaml(config))
    code = (
        "import sys; from configs.load import load_config; "
        "from curation.config import CurateConfig; "
        "from curation.job import curate; curate(load_config(sys.argv[1], CurateConfig))"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": ray_address()},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while driver.poll() is None and time.monotonic() < deadline:
        if any(folder.glob(pattern)):
            time.sleep(delay_seconds)
            break
        time.sleep(0.002)
    driver.send_signal(signal.SIGKILL)
    return driver.wait()


def test_a_file_of_another_tool_is_never_taken_for_ours(job):
    output = Path(job().output)
    output.mkdir()
    for name in ("config.yaml", "99999.tar", "00000.tar"):
        (output / name).write_text("foreign")
    with pytest.raises(UsageError, match="not empty"):
        curate(job())
    assert {path.read_text() for path in output.iterdir()} == {"foreign"}


def test_a_finished_dataset_keeps_files_that_a_user_put_beside_it(job):
    curate(job())
    extra = Path(job().output, "99999.tar")
    extra.write_text("mine")
    curate(job())
    assert extra.read_text() == "mine"
    assert not list(extra.parent.glob(".*"))


def test_a_finished_dataset_is_not_rewritten_when_content_behind_its_configuration_changes(
    job, pool, tars, tmp_path
):
    metadata = tmp_path / "metadata.txt"
    shutil.copy(pool / "metadata.txt", metadata)
    rules = [{"name": "metaclip", "metadata": str(metadata), "t": 3}]
    curate(job(rules=rules))
    before = tars.hashes(Path(job().output))
    metadata.write_text("red\n")
    with pytest.raises(UsageError, match="made from other inputs or metadata"):
        curate(job(rules=rules))
    assert tars.hashes(Path(job().output)) == before


def test_relative_paths_hold_where_workers_have_another_folder(
    finished, configure, pool, tars, tmp_path, monkeypatch
):
    shutil.copy(pool / "metadata.txt", tmp_path)
    monkeypatch.chdir(tmp_path)  # not that of the workers, which run already
    rules = to_tree(configure(tmp_path))["rules"]
    rules[2]["metadata"] = "metadata.txt"
    config = configure(Path(), rules=rules)
    assert config.output == "dataset"
    curate(config)
    for path in Path(finished[0].output).glob("*.tar"):
        assert (tmp_path / "dataset" / path.name).read_bytes() == path.read_bytes()


def test_an_unfinished_job_goes_on_after_its_sources_moved(finished, job, pool, tars, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(pool / "train", first)
    curate(job(sources=[{"name": "pool", "shards": str(first)}]))
    output = Path(job().output)
    (output / "manifest.json").unlink()
    (output / "00001.tar").unlink()
    (output / ".pairmill-unfinished").touch()
    first.rename(second)
    curate(job(sources=[{"name": "pool", "shards": str(second)}]))
    for path in Path(finished[0].output).glob("*.tar"):
        assert (output / path.name).read_bytes() == path.read_bytes()


def test_a_source_that_changed_under_its_size_is_not_copied(job, pool, tmp_path):
    shutil.copytree(pool / "train", tmp_path / "in")
    config = {"sources": [{"name": "pool", "shards": str(tmp_path / "in")}]}
    curate(job(**config, stages=["scan", "decide"]))
    for path in (tmp_path / "in").glob("*.tar"):
        data = path.read_bytes()
        path.write_bytes(data.replace(b"thing", b"THING"))
    with pytest.raises(DataError, match="is not the tar that was scanned"):
        curate(job(**config, stages=["write"]))
    curate(job(**config))
    assert "THING" in read_index(Path(job().output, "00000.tar"))["caption"][0].as_py()


def test_tables_that_are_not_those_of_the_decision_are_refused(job):
    curate(job(stages=["scan", "decide", "write"]))
    folder = job().work_dir / "decisions" / "pool"
    good = (folder / "00001.parquet").read_bytes()
    (folder / "00001.parquet").write_bytes((folder / "00002.parquet").read_bytes())
    for stages in (["report"], ["write"]):
        with pytest.raises(DataError, match=r"00001\.parquet .*stages=\[decide\]"):
            curate(job(stages=stages))
        shutil.rmtree(job().output, ignore_errors=True)
        for plan in job().work_dir.glob("plan-*"):
            shutil.rmtree(plan)
    (folder / "00001.parquet").write_bytes(good)
    indexes = Path(job().index_dir) / "pool"
    shutil.copy(indexes / "00002.index.parquet", indexes / "00001.index.parquet")
    with pytest.raises(DataError, match=r"00001\.index\.parquet .*stages=\[decide\]"):
        curate(job(stages=["write"]))


def test_the_texts_of_a_block_may_pass_two_gibibytes(finished):
    for block in finished[0].work_dir.glob("plan-*/block-*.arrow"):
        with pa.OSFile(str(block)) as file, pa.ipc.open_file(file) as reader:
            schema = reader.schema
        assert {str(schema.field(name).type) for name in ("key", "caption")} == {"large_string"}


def test_num_workers_holds_on_a_joined_cluster_too(tmp_path):
    code = """
import sys, time, pathlib
from curation.config import EngineConfig
from curation.engine import Engine
from curation.index import IndexInfo
from curation.scan import Scanned

def work(task):
    mark = pathlib.Path(task)
    mark.touch()
    time.sleep(0.3)
    num_running = len(list(mark.parent.glob("running-*")))
    mark.unlink()
    return Scanned(info=IndexInfo(source="", shard="", num_bytes=0, num_samples=num_running))

tasks = [f"{sys.argv[1]}/running-{i}" for i in range(3)]
with Engine(EngineConfig(num_workers=1)) as engine:
    print(max(result.num_samples for _, result in engine.map(work, tasks, label="test")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": ray_address()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "1"
