"""Kills at random moments and full disks: nothing is lost, and the bytes are always the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
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


def is_there(folder: Path, pattern: str) -> bool:
    try:
        return any(folder.glob(pattern))
    except FileNotFoundError:  # a folder on the way went while it was looked into
        return False


def kill_one(victims, folder: Path, rng: random.Random, *, worker: bool, is_over) -> str:
    """Kill one of the processes `victims()` at some moment of a job; say which, or "nothing"."""
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
    start, is_time = time.monotonic(), False
    while not is_over() and time.monotonic() - start < 120:
        if is_time or is_there(folder, pattern):
            if not is_time:
                time.sleep(delay)
            is_time = True
            targets = victims()
            if targets:
                os.kill(rng.choice(targets), signal.SIGKILL)
                return f"{'worker' if worker else 'driver'} after {pattern}"
        time.sleep(0.0005)
    return "nothing"


def curate_and_kill(config, folder: Path, rng: random.Random) -> str:
    """Run a job in the Ray of all tests; kill one of its workers at some moment."""
    (folder / "job.yaml").write_text(to_yaml(config))
    is_over = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        hit = threads.submit(
            kill_one, lambda: workers_of(os.getpid()), folder, rng, worker=True,
            is_over=is_over.is_set,
        )  # fmt: skip
        try:
            curate(config)
        finally:
            is_over.set()
        return hit.result()


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
    victims = (lambda: workers_of(driver.pid)) if worker else (lambda: [driver.pid])
    hit = kill_one(victims, folder, rng, worker=worker, is_over=lambda: driver.poll() is not None)
    code = driver.wait(timeout=180)
    # A job outlives the death of a worker, and no job outlives that of its driver.
    assert code == (0 if worker or hit == "nothing" else -signal.SIGKILL), (code, hit)
    return hit


def kill_and_compare(finished, configure, folder: Path, tars, run) -> str:
    """`run(config, folder)` runs a job and kills; what it or a rerun makes are the very bytes."""
    for attempt in range(5):
        (folder / str(attempt)).mkdir()
        config = configure(folder / str(attempt))
        hit = run(config, folder / str(attempt))
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
    run = partial(curate_and_kill, rng=random.Random(seed))
    print(kill_and_compare(finished, configure, tmp_path, tars, run))


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.parametrize("kill", range(10))
def test_soak_of_ten_kills(finished, configure, tars, tmp_path, kill):
    seed = int(os.environ.get("PAIRMILL_TEST_SEED") or random.randrange(10**6)) + kill
    print(f"\nPAIRMILL_TEST_SEED={seed}", end=" ")
    run = partial(run_and_kill, rng=random.Random(seed), worker=kill % 2 == 1)
    print(kill_and_compare(finished, configure, tmp_path, tars, run))


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
