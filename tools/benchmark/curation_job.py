"""A whole curation job against Ray Data and against the physical limit (see curation.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from configs.load import to_yaml, validate
from curation.arrow import keep_pandas_out
from curation.config import CurateConfig
from curation.engine import Engine
from curation.job import curate
from tools.benchmark.ratio import Ratio, seconds
from tools.benchmark.synthetic_shards import make_shards

_RULES = [{"name": "caption_length", "min_words": 8}]


def configure(folder: Path, inputs: Path, **changes: Any) -> CurateConfig:
    """Return the configuration of a job over `inputs` that keeps all, on two workers."""
    tree = {
        "name": "benchmark",
        "output": str(folder / "dataset"),
        "index_dir": str(folder / "indexes"),
        "sources": [{"name": "in", "shards": str(inputs)}],
        "write": {"samples_per_shard": 2000},
        "engine": {"num_workers": 2},
    }
    return validate({**tree, **changes}, CurateConfig, label="benchmark")


def read_and_hash(paths: Sequence[Path]) -> None:
    """Read files from their start to their end and hash them."""
    buffer = bytearray(4 << 20)
    for path in paths:
        hasher = xxhash.xxh3_128()
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                hasher.update(memoryview(buffer)[:size])


def copy_and_hash(paths: Sequence[Path], target: Path) -> None:
    """Copy files to a new folder, flush them to disk, and hash the copies."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in paths:
        subprocess.run(["cp", path, target], check=True)
        subprocess.run(["sync", target / path.name], check=True)
        read_and_hash([target / path.name])


_RAY_DATA = """
import sys, time, glob, logging, os, shutil
import ray, ray.data
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
ray.data.DataContext.get_current().enable_progress_bars = False
paths = sorted(glob.glob(sys.argv[1] + "/*.tar"))
for number in range(int(sys.argv[3])):
    shutil.rmtree(f"{sys.argv[2]}-{number - 1}", ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    data = ray.data.read_webdataset(paths, decoder=None)
    kept = data.filter(lambda row: len(row["txt"].split()) >= 8)
    kept.write_webdataset(f"{sys.argv[2]}-{number}", encoder=None)
    print(time.perf_counter() - start, flush=True)
"""


def _run_python(code: str, *arguments: object) -> str:
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        check=True, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    return done.stdout


def bench_job(folder: Path, scale: int, repeats: int, tars: str | None) -> Iterator[str]:
    """A whole job, again and again; Ray is started on both sides before the clock is.

    8 shards of 2,000 samples, 0.8 GB: a small job; there start-up counts most. Then whole commands.
    What a side wrote is removed before it writes again, as the copy's is: on a virtual machine
    memory that was never used has to come from the host, which takes longer than to fill it.
    """
    inputs = make_shards(folder / "in", 8, 2000 * scale)
    copy_and_hash(inputs, folder / "copy")  # memory that was used
    shutil.rmtree(folder / "copy")
    keep_pandas_out()  # as the `pairmill` command does
    arguments = (folder / "in", folder / "ray", 1 + repeats)
    theirs = list(map(float, _run_python(_RAY_DATA, *arguments).split()[-1 - repeats :]))
    shutil.rmtree(folder / f"ray-{repeats}")
    times = []
    with Engine(configure(folder, folder / "in").engine):
        for number in range(1 + repeats):
            config = configure(folder / str(number), folder / "in", rules=_RULES)
            shutil.rmtree(folder / str(number - 1), ignore_errors=True)
            os.sync()
            times.append(seconds(lambda config=config: curate(config)))  # type: ignore[misc]
    kept = sorted((folder / str(repeats) / "dataset").glob("*.tar"))
    limits = []
    for _ in range(repeats):
        os.sync()
        limits.append(seconds(lambda: copy_and_hash(kept, folder / "copy")))
    # In the first run both start their workers, in the others these are there.
    for name, ours, their in (
        ("first run", times[0], theirs[0]),
        ("best of the others", min(times[1:]), min(theirs[1:])),
    ):
        yield Ratio(f"job, {name} / Ray Data", ours, their, 0.0).line(15.0)
        yield f"    {16_000 * scale / ours:,.0f} samples/s, theirs {16_000 * scale / their:,.0f}"
        yield Ratio(f"job, {name} / cp, sync, xxh3 of what it keeps", ours, min(limits), 0.0).text
    yield from _whole_commands(folder, scale, repeats)


def _whole_commands(folder: Path, scale: int, repeats: int) -> Iterator[str]:
    """8 shards of 1,000, from the start of a process to its end, and Ray's with it."""
    inputs = folder / "in-8000"
    make_shards(inputs, 8, 1000 * scale)
    command = "import sys; from tools.cli import main; sys.argv[0] = 'pairmill'; main()"
    ours, theirs = [], []
    for number in range(repeats):
        os.sync()
        arguments = (inputs, folder / f"ray-whole-{number}", 1)
        theirs.append(seconds(partial(_run_python, _RAY_DATA, *arguments)))
        config = configure(folder / f"whole-{number}", inputs, rules=_RULES)
        path = folder / f"whole-{number}.yaml"
        path.write_text(to_yaml(config))
        os.sync()
        ours.append(seconds(partial(_run_python, command, "curate", path)))
    yield Ratio("job, 8 x 1000, whole command / Ray Data", min(ours), min(theirs), 0.0).line(15.0)
    yield f"    {8000 * scale / min(ours):,.0f} samples/s, theirs {8000 * scale / min(theirs):,.0f}"
