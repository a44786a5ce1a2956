"""Curation against its peers and its limits, on the same files in the same run.

`python -m tools.benchmark.curation [scan] [write] [job] [workers] [memory] [--help]`

scan     headers against Python's tarfile; hashed against a plain read + xxh3 of the same bytes
write    the write stage against `cp`, flushed to disk as ours is, and the same digest
job      a whole job against Ray Data: read_webdataset, filter, write_webdataset
workers  two Ray workers against two independent processes that do the same
memory   peak PSS of driver and workers at 20 and at 200 shards
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash
from PIL import Image

from configs.load import to_yaml, validate
from curation.arrow import keep_pandas_out
from curation.config import CurateConfig
from curation.engine import Engine
from curation.job import curate
from curation.scan import InputShard, ScanTask, scan_shard
from curation.shards import read_batches
from curation.spans import open_tar
from curation.work import DECIDED, WorkFolder
from curation.write import write
from tools.benchmark.pss import pss_of, workers_below
from tools.benchmark.ratio import Ratio, alternate, seconds
from tools.benchmark.synthetic_shards import drop_from_cache, make_shards

_PARTS = ("scan", "write", "job", "workers", "memory")


def _tasks(paths: Sequence[Path], indexes: Path, columns: tuple[str, ...] = ()) -> list[ScanTask]:
    shutil.rmtree(indexes, ignore_errors=True)
    return [
        ScanTask(
            input=InputShard(
                source="s", shard=p.name, path=str(p), index=indexes / f"{p.stem}.parquet"
            ),
            columns=columns,
        )
        for p in paths
    ]


def _scan(paths: Sequence[Path], indexes: Path, columns: tuple[str, ...] = ()) -> None:
    for task in _tasks(paths, indexes, columns):
        scan_shard(task)


def _rows_by_tarfile(paths: Sequence[Path]) -> None:
    """Find with tarfile and Pillow what an index holds; write nothing."""
    for path in paths:
        rows: dict[str, dict[str, Any]] = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                row = rows.setdefault(key, {})
                row[extension] = (member.offset, member.offset_data, member.size)
                content = tar.extractfile(member)
                assert content is not None
                if extension == "jpg":
                    with Image.open(content) as image:
                        row["size"] = image.size
                elif extension == "txt":
                    row["caption"] = content.read().decode()


def _list_by_tarfile(paths: Sequence[Path]) -> None:
    for path in paths:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                assert member.offset_data >= member.offset + 512


def _list(paths: Sequence[Path]) -> None:
    for path in paths:
        with open_tar(path) as reader:
            for batch in read_batches(reader):
                assert batch.names


def _read_and_hash(paths: Sequence[Path]) -> None:
    buffer = bytearray(4 << 20)
    for path in paths:
        hasher = xxhash.xxh3_128()
        with path.open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                hasher.update(memoryview(buffer)[:size])


def cold(paths: Sequence[Path], function: Callable[[], object], repeats: int) -> float:
    """Return the best seconds of reading files that are not in the page cache."""
    times = []
    for _ in range(repeats):
        os.sync()  # what the last run left to write is not this one's business
        drop_from_cache(paths)
        times.append(seconds(function))
    return min(times)


def bench_scan(folder: Path, scale: int, repeats: int) -> Iterator[str]:
    """Scan in its two modes."""
    paths, indexes = make_shards(folder / "in", 2, 5000 * scale), folder / "indexes"
    rate = 2 * 5000 * scale
    found = alternate(
        "scan: index (captions, sizes) / tarfile + Pillow", lambda: _scan(paths, indexes),
        lambda: _rows_by_tarfile(paths), repeats=repeats,
    )  # fmt: skip
    yield found.line(10.0)
    yield f"    {rate / found.ours_s:,.0f} samples/s, index published"
    listed = alternate(
        "scan: names, offsets, sums checked / tarfile", lambda: _list(paths),
        lambda: _list_by_tarfile(paths), repeats=repeats,
    )  # fmt: skip
    yield listed.line(10.0)
    hashed = ("image_hash",)
    yield alternate(
        "scan: hashed, warm / read + xxh3", lambda: _scan(paths, indexes, hashed),
        lambda: _read_and_hash(paths), repeats=repeats,
    ).line(0.8)  # fmt: skip
    ours = cold(paths, lambda: _scan(paths, indexes, hashed), repeats)
    theirs = cold(paths, lambda: _read_and_hash(paths), repeats)
    yield Ratio("scan: hashed, cold / read + xxh3", ours, theirs, 0.0).line(0.8)


class _Here:
    """Runs tasks one after the other in this process, as an Engine would elsewhere."""

    def map(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], **_: str
    ) -> Iterator[tuple[int, Any]]:
        for position, task in enumerate(tasks):
            yield position, function(task)


def _configure(folder: Path, inputs: Path, **changes: Any) -> CurateConfig:
    tree = {
        "name": "benchmark",
        "output": str(folder / "dataset"),
        "index_dir": str(folder / "indexes"),
        "sources": [{"name": "in", "shards": str(inputs)}],
        "write": {"samples_per_shard": 2000},
        "engine": {"num_workers": 2},
    }
    return validate({**tree, **changes}, CurateConfig, label="benchmark")


def _copy_and_hash(paths: Sequence[Path], target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in paths:
        subprocess.run(["cp", path, target], check=True)
        subprocess.run(["sync", target / path.name], check=True)
        _read_and_hash([target / path.name])


def bench_write(folder: Path, scale: int, repeats: int) -> Iterator[str]:
    """The write stage: order, keys and copy, of all samples."""
    paths = make_shards(folder / "in", 2, 4000 * scale)
    config = _configure(folder / "job", folder / "in")
    curate(config.model_copy(update={"stages": ("scan", "decide")}))
    work = WorkFolder(config.work_dir)
    import pyarrow.parquet as pq

    decided = pq.read_table(work.folder / "decided.parquet", partitioning=None)
    assert set(DECIDED.names) <= set(decided.column_names)
    engine: Any = _Here()

    def ours() -> None:
        shutil.rmtree(config.output_dir, ignore_errors=True)
        for plan in work.folder.glob("plan-*"):
            shutil.rmtree(plan)
        write(config, decided, engine)

    def theirs() -> None:
        _copy_and_hash(paths, folder / "copy")

    yield alternate("write, warm / cp, sync, xxh3", ours, theirs, repeats=repeats).line(0.9)
    figures = [cold(paths, function, repeats) for function in (ours, theirs)]
    yield Ratio("write, cold / cp, sync, xxh3", figures[0], figures[1], 0.0).line(0.9)


_RAY_DATA = """
import sys, time, glob, logging
import ray, ray.data
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
ray.data.DataContext.get_current().enable_progress_bars = False
paths = sorted(glob.glob(sys.argv[1] + "/*.tar"))
for number in range(2):
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


def bench_job(folder: Path, scale: int, repeats: int) -> Iterator[str]:
    """A whole job, twice; Ray is started on both sides before the clock is.

    8 shards of 2,000 samples, 0.8 GB: a small job; there start-up counts most.
    """
    make_shards(folder / "in", 8, 2000 * scale)
    os.sync()
    keep_pandas_out()  # as the `pairmill` command does
    theirs = list(map(float, _run_python(_RAY_DATA, folder / "in", folder / "ray").split()[-2:]))
    rules = [{"name": "caption_length", "min_words": 8}]
    times = []
    with Engine(_configure(folder, folder / "in").engine):
        for number in range(2):
            config = _configure(folder / str(number), folder / "in", rules=rules)
            os.sync()  # Ray Data leaves what it wrote to the kernel: not to be flushed in our time
            times.append(seconds(lambda config=config: curate(config)))  # type: ignore[misc]
    # In the first run both start their workers, in the second these are there.
    for name, ours, their in zip(("first run", "second run"), times, theirs, strict=True):
        yield Ratio(f"job, {name} / Ray Data", ours, their, 0.0).line(15.0)
        yield f"    {16_000 * scale / ours:,.0f} samples/s, theirs {16_000 * scale / their:,.0f}"


_INDEPENDENT = """
import sys, time
from pathlib import Path
from tools.benchmark.curation import _scan
paths = [Path(p) for p in sys.argv[2:]]
_scan(paths[:1], Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
_scan(paths, Path(sys.argv[1]), ("image_hash",))
print("done", flush=True)
"""


def _independent(paths: Sequence[Path], folder: Path) -> float:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _INDEPENDENT, folder / f"own-{n}", *paths[n::2]],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for n in range(2)
    ]  # fmt: skip
    pipes = [(p.stdin, p.stdout) for p in processes]
    for _, out in pipes:
        assert out is not None
        assert out.readline() == "ready\n"
    start = time.perf_counter()
    for into, _ in pipes:
        assert into is not None
        into.write("\n")
        into.flush()
    for _, out in pipes:
        assert out is not None
        assert out.readline() == "done\n"
    took = time.perf_counter() - start
    for process in processes:
        process.wait()
    return took


def bench_workers(folder: Path, scale: int, repeats: int) -> Iterator[str]:
    """Two workers of Ray, two processes of their own, all of them warm; 16 shards of 2,000."""
    paths = make_shards(folder / "in", 16, 2000 * scale)
    ours, theirs = [], []
    with Engine(_configure(folder, folder / "in").engine) as engine:

        def run() -> None:
            tasks = _tasks(paths, folder / "indexes", ("image_hash",))
            list(engine.map(scan_shard, tasks, label="scan"))

        run()
        for _ in range(repeats):
            ours.append(seconds(run))
            theirs.append(_independent(paths, folder))
    yield Ratio("2 Ray workers / 2 processes", min(ours), min(theirs), 0.0).line(0.9)


_JOB = """
import sys
from configs.load import load_config
from curation.config import CurateConfig
from curation.job import curate
curate(load_config(sys.argv[1], CurateConfig))
"""


def _peaks(config: CurateConfig, folder: Path) -> tuple[int, int]:
    """Run a job in a process of its own; return the peak PSS of its driver and of any worker."""
    path = folder / "job.yaml"
    path.write_text(to_yaml(config))
    job = subprocess.Popen([sys.executable, "-c", _JOB, path], stderr=subprocess.PIPE, text=True)
    driver = worker = 0
    while job.poll() is None:
        driver = max(driver, pss_of(job.pid))
        worker = max([worker, *map(pss_of, workers_below(job.pid))])
        time.sleep(0.05)
    assert job.returncode == 0, job.stderr and job.stderr.read()
    return driver, worker


def bench_memory(folder: Path, scale: int, repeats: int) -> Iterator[str]:
    """20 and 200 shards of one size; a block is 20 shards in both."""
    paths = make_shards(folder / "in-20", 20, 200 * scale)
    many = folder / "in-200"
    many.mkdir()
    for number in range(200):
        shutil.copy(paths[number % 20], many / f"{number:05d}.tar")
    layout = {"samples_per_shard": 1000 * scale, "shards_per_block": 20}
    rules = [{"name": "caption_length", "min_words": 5}]
    found = {}
    for name in ("in-20", "in-200"):
        config = _configure(folder / f"job-{name}", folder / name, write=layout, rules=rules)
        (folder / f"job-{name}").mkdir()
        found[name] = _peaks(config, folder / f"job-{name}")
    for which, role in enumerate(("driver", "worker")):
        few, more = found["in-20"][which] / 1e6, found["in-200"][which] / 1e6
        verdict = "ok" if more <= 1.1 * few else "SHORT"
        yield f"memory: {role:<44} {few:8.1f} MB at 20, {more:8.1f} MB at 200 shards  {verdict}"


def main() -> None:
    """Run the parts that were asked for; print one line a measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*_PARTS, []], help="all where none is given")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument("--scale", type=int, default=1, help="times as many samples")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 would starve Ray's beside other work
    for part in options.parts or _PARTS:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix=f"bench-{part}-") as folder:
            for line in globals()[f"bench_{part}"](Path(folder), options.scale, options.repeats):
                print(line, flush=True)


if __name__ == "__main__":
    main()
