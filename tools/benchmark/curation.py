"""Curation against its peers and its limits, on the same files in the same run.

`python -m tools.benchmark.curation [scan] [write] [job] [workers] [memory] [--help]`

scan     headers against Python's tarfile; hashed against a plain read + xxh3 of the same bytes
write    the write stage against `cp`, flushed to disk as ours is, and the same digest
job      a whole job against Ray Data (read_webdataset, filter, write_webdataset) and against the
         physical limit: cp of what it keeps, flushed to disk as ours is, and the same digest
workers  two Ray workers against two independent processes that do the same
memory   peak PSS of driver and workers at 20 and at 200 shards
"""

from __future__ import annotations

import argparse
import glob
import itertools
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from configs.load import to_yaml
from curation.config import CurateConfig
from curation.engine import Engine
from curation.job import curate
from curation.scan import InputShard, ScanTask, scan_shard
from curation.shards import read_batches
from curation.spans import open_tar
from curation.work import DECIDED, WorkFolder
from curation.write import write
from tools.benchmark.curation_job import bench_job, configure, copy_and_hash, read_and_hash
from tools.benchmark.pss import pss_of, workers_below
from tools.benchmark.ratio import Ratio, alternate, seconds
from tools.benchmark.synthetic_shards import drop_from_cache, make_shards

__all__ = ["bench_job"]  # found by name, as those below are

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


def bench_scan(folder: Path, scale: int, repeats: int, tars: str | None) -> Iterator[str]:
    """Scan in its two modes; `tars`: a pattern of others, which are hashed as well."""
    paths = make_shards(folder / "in", 2, 5000 * scale)
    numbers = itertools.count()

    def scan(*columns: str, tars: Sequence[Path] = paths) -> None:
        # Into a new folder: to remove the indexes of the last time is no part of a scan.
        _scan(tars, folder / f"indexes-{next(numbers)}", columns)

    found = alternate(
        "scan: index (captions, sizes) / tarfile + Pillow", scan,
        lambda: _rows_by_tarfile(paths), repeats=repeats,
    )  # fmt: skip
    yield found.line(10.0)
    yield f"    {2 * 5000 * scale / found.ours_s:,.0f} samples/s, index published"
    listed = alternate(
        "scan: names, offsets, sums checked / tarfile", lambda: _list(paths),
        lambda: _list_by_tarfile(paths), repeats=repeats,
    )  # fmt: skip
    yield listed.line(10.0)
    kinds = {"": paths, "given tars, ": [Path(path) for path in sorted(glob.glob(tars or ""))]}
    for kind, files in kinds.items():
        if not files:
            continue

        def ours(files: Sequence[Path] = files) -> None:
            scan("image_hash", tars=files)

        def theirs(files: Sequence[Path] = files) -> None:
            read_and_hash(files)

        theirs()  # given files may not be in memory yet
        name = f"scan: hashed, {kind}warm / read + xxh3"
        yield alternate(name, ours, theirs, repeats=repeats).line(0.8)
        name = f"scan: hashed, {kind}cold / read + xxh3"
        before = partial(drop_from_cache, files)
        yield alternate(name, ours, theirs, repeats=repeats, before=before).line(0.8)


class _Here:
    """Runs tasks one after the other in this process, as an Engine would elsewhere."""

    def map(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], **_: str
    ) -> Iterator[tuple[int, Any]]:
        for position, task in enumerate(tasks):
            yield position, function(task)


def bench_write(folder: Path, scale: int, repeats: int, tars: str | None) -> Iterator[str]:
    """The write stage: order, keys and copy, of all samples."""
    paths = make_shards(folder / "in", 2, 4000 * scale)
    config = configure(folder / "job", folder / "in")
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
        copy_and_hash(paths, folder / "copy")

    yield alternate("write, warm / cp, sync, xxh3", ours, theirs, repeats=repeats).line(0.9)
    before = partial(drop_from_cache, paths)
    name = "write, cold / cp, sync, xxh3"
    yield alternate(name, ours, theirs, repeats=repeats, before=before).text  # to be said


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


def bench_workers(folder: Path, scale: int, repeats: int, tars: str | None) -> Iterator[str]:
    """Two workers of Ray, two processes of their own, all of them warm; 16 shards of 2,000."""
    paths = make_shards(folder / "in", 16, 2000 * scale)
    ours, theirs = [], []
    with Engine(configure(folder, folder / "in").engine) as engine:

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


def bench_memory(folder: Path, scale: int, repeats: int, tars: str | None) -> Iterator[str]:
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
        config = configure(folder / f"job-{name}", folder / name, write=layout, rules=rules)
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
    parser.add_argument("--tars", help="scan: a pattern of tars to hash besides, such as photos")
    options = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 would starve Ray's beside other work
    for part in options.parts or _PARTS:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix=f"bench-{part}-") as folder:
            bench = globals()[f"bench_{part}"]
            for line in bench(Path(folder), options.scale, options.repeats, options.tars):
                print(line, flush=True)


if __name__ == "__main__":
    main()
