"""Kills at random moments and full disks: nothing is lost, and the bytes are always the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from configs.errors import DataError
from configs.load import to_yaml
from curation.index import index_path, read_index_info
from curation.job import curate
from curation.scan import InputShard, ScanTask, scan_shard

ROOT = Path(__file__).resolve().parents[2]
_JOB = (
    "import sys; from configs.load import load_config; "
    "from curation.config import CurateConfig; "
    "from curation.job import curate; curate(load_config(sys.argv[1], CurateConfig))"
)


def children_of(pid: int) -> list[int]:
    found = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, thread.read_text().split())
        except OSError:
            continue
    return found


def workers_of(driver: int) -> list[int]:
    """Return the processes that run tasks of the Ray that a driver has started."""
    below, found = [driver], []
    while below:
        below = [child for pid in below for child in children_of(pid)]
        for pid in below:
            try:
                title = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if title.startswith(b"ray::run_task"):
                found.append(pid)
    return found


def run_and_kill(config, folder: Path, rng: random.Random, *, worker: bool) -> str:
    """Run a job with a Ray of its own; kill its driver, or one of its workers, at some moment."""
    path = folder / "job.yaml"
    path.write_text(to_yaml(config))
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    driver = subprocess.Popen(
        [sys.executable, "-c", _JOB, str(path)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    start, hit = time.monotonic(), "nothing"
    files = [
        "**/*.index.parquet",
        "*.work/decisions/**/*.parquet",
        "*.work/plan-*/*",
        "dataset/*.tar",
    ]
    # Tasks are short: of a worker any moment from the first task on, and as soon as it has one.
    pattern, delay = rng.choice(files), rng.uniform(0, 0.02 if worker else 0.3)
    if worker:
        pattern = rng.choice(["job.yaml", *files[:2]])
    is_time = False
    while driver.poll() is None and time.monotonic() - start < 120:
        if is_time or any(folder.glob(pattern)):
            if not is_time:
                time.sleep(delay)
            is_time = True
            targets = workers_of(driver.pid) if worker else [driver.pid]
            if targets:
                victim = rng.choice(targets)
                os.kill(victim, signal.SIGKILL)
                hit = f"{'worker' if worker else 'driver'} after {pattern}"
                break
        time.sleep(0.0005)
    code = driver.wait(timeout=180)
    # A job outlives the death of a worker, and no job outlives that of its driver.
    assert code == (0 if worker or hit == "nothing" else -signal.SIGKILL), (code, hit)
    return hit


def kill_and_compare(finished, configure, folder: Path, tars, rng, *, worker: bool) -> str:
    for attempt in range(5):
        (folder / str(attempt)).mkdir()
        config = configure(folder / str(attempt))
        hit = run_and_kill(config, folder / str(attempt), rng, worker=worker)
        if hit != "nothing":  # the job was faster
            break
    assert hit != "nothing"
    curate(config)
    assert tars.hashes(Path(config.output)) == tars.hashes(Path(finished[0].output)), hit
    return hit


@pytest.mark.ray
def test_a_job_whose_worker_is_killed_ends_and_gives_the_same_bytes(
    finished, configure, tars, tmp_path
):
    seed = int(os.environ.get("PAIRMILL_TEST_SEED") or random.randrange(10**6))
    print(f"PAIRMILL_TEST_SEED={seed}")
    print(kill_and_compare(finished, configure, tmp_path, tars, random.Random(seed), worker=True))


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.parametrize("kill", range(10))
def test_soak_of_ten_kills(finished, configure, tars, tmp_path, kill):
    seed = int(os.environ.get("PAIRMILL_TEST_SEED") or random.randrange(10**6)) + kill
    print(f"\nPAIRMILL_TEST_SEED={seed}", end=" ")
    rng = random.Random(seed)
    worker = kill % 2 == 1
    print(kill_and_compare(finished, configure, tmp_path, tars, rng, worker=worker))


@contextmanager
def small_disk(folder: Path, num_bytes: int):
    """A file system of its own that is soon full."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")


@needs_root
def test_an_index_that_finds_no_room_is_a_clear_error_twenty_times(tars, tmp_path):
    members = [m for i in range(60) for m in tars.sample(f"{i:04d}", f"{os.urandom(90).hex()}")]
    path = tars.write(tmp_path / "a.tar", members)
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        for number in range(20):
            filler = disk / "filler"
            filler.write_bytes(bytes((60 << 10) + 200 * number))
            shard = InputShard(source="s", shard="a.tar", path=str(path), index=disk / "a.parquet")
            with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
                scan_shard(ScanTask(input=shard))
            assert [p.name for p in disk.iterdir()] == ["filler"]
            filler.unlink()
    index = tmp_path / index_path("a.tar")
    shard = InputShard(source="s", shard="a.tar", path=str(path), index=index)
    assert scan_shard(ScanTask(input=shard)).num_samples == 60
    assert read_index_info(index) is not None


@needs_root
@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_disk_that_fills_while_shards_are_written_stops_the_job_and_the_same_line_goes_on(
    finished, configure, tars, tmp_path
):
    config = configure(tmp_path)
    curate(configure(tmp_path, stages=["scan", "decide"]))
    size = sum(p.stat().st_size for p in Path(finished[0].output).glob("*.tar"))
    with small_disk(Path(config.output), size // 2):
        with pytest.raises(DataError, match=r"No space left on device.*run the same line again"):
            curate(config)
        assert not (config.output_dir / "manifest.json").exists()
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", config.output], check=True)
        curate(config)
        assert tars.hashes(config.output_dir) == tars.hashes(Path(finished[0].output))
