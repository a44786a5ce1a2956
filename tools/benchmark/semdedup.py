"""Time and peak memory of SemDeDup over synthetic vectors on disk.

`python -m tools.benchmark.semdedup [--rows 1000000] [--dim 512] [--clusters 1000]`

Indexes and vectors (float16, `dim` numbers a sample) are written to a temporary folder: samples
around 5,000 centers, and three in ten near one of 100,000 vectors that come again and again. Then
the decide stage runs over them in this process with Ray workers: k-means on 64 samples a cluster,
the nearest centroid of each sample, and all pairs of each cluster. The time is that of `decide`
from start to decision tables, and the CPU seconds those of the workers, their imports included;
Ray's own start is in neither. Memory: decide_memory.PeakMemory.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from configs.load import validate
from curation.arrow import keep_pandas_out
from curation.config import CurateConfig
from curation.decide import decide
from curation.engine import Engine
from curation.index import SCHEMA, IndexInfo, digest_of_index, write_index
from curation.vectors import write_vectors
from curation.work import SCANNED, WorkFolder
from tools.benchmark.decide_memory import PeakMemory
from tools.benchmark.pss import workers_below

_NUM_CENTERS, _NUM_REPEATED = 5_000, 100_000
_REPEATED_SHARE = 0.3
_SPREAD, _JITTER = 0.7, 0.1  # length of what is added to a center, and to a repeated vector
_VECTORS = "image"


def _directions(rng: np.random.Generator, num: int, dim: int) -> npt.NDArray[np.float32]:
    drawn = rng.standard_normal((num, dim), dtype=np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return drawn


@cache
def _shared(dim: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the centers and the vectors that come again and again."""
    rng = np.random.default_rng(0)
    return _directions(rng, _NUM_CENTERS, dim), _directions(rng, _NUM_REPEATED, dim)


def _vectors(number: int, num: int, dim: int) -> npt.NDArray[np.float16]:
    """Return the vectors of one shard: unit rows."""
    rng, (centers, repeated) = np.random.default_rng(number + 1), _shared(dim)
    drawn = centers[rng.integers(_NUM_CENTERS, size=num)] + _SPREAD * _directions(rng, num, dim)
    again = np.flatnonzero(rng.random(num) < _REPEATED_SHARE)
    drawn[again] = repeated[rng.integers(_NUM_REPEATED, size=len(again))]
    drawn[again] += _JITTER * _directions(rng, len(again), dim)
    unit: npt.NDArray[np.float32] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return unit.astype(np.float16)


def _index_table(number: int, num: int) -> pa.Table:
    uids = [None, pa.py_buffer(np.random.default_rng(number).bytes(16 * num))]
    made = {
        "uid": pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), num, uids),
        "key": pa.array([f"{number:05d}{row:05d}" for row in range(num)]),
        "caption": pa.array(["a caption"] * num),
        "width": pa.array(np.full(num, 224, np.int32)),
        "height": pa.array(np.full(num, 224, np.int32)),
    }
    arrays = [made.get(f.name, pa.nulls(num, f.type)) for f in SCHEMA]
    return pa.table(arrays, schema=SCHEMA)


def _write_pool(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Write indexes and vectors; return rows of the table that a scan would leave."""
    rows = []
    for number in range(-(-options.rows // options.rows_a_shard)):
        num = min(options.rows_a_shard, options.rows - number * options.rows_a_shard)
        path, shard = folder / "indexes" / f"{number:06d}.index.parquet", f"{number:06d}.tar"
        info = IndexInfo(source="synthetic", shard=shard, num_bytes=1, num_samples=num)
        info = write_index(path, _index_table(number, num), info)
        write_vectors(path, _VECTORS, _vectors(number, num, options.dim))
        rows.append(
            {
                "source": "synthetic",
                "shard": shard,
                "path": str(folder / shard),
                "index": str(path),
                "index_digest": digest_of_index(info),
                "num_samples": num,
                "num_bytes": 1,
                "ignored_members": 0,
                "unreadable": "{}",
            }
        )
    return rows


def _cpu_seconds(pid: int) -> float:
    """Return the CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _run(folder: Path, options: argparse.Namespace) -> None:
    keep_pandas_out()  # as the `pairmill` command does
    # Another process makes the pool: what it leaves in memory is not decide's.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        rows = other.submit(_write_pool, folder, options).result()
    tree = {
        "name": "semdedup",
        "output": str(folder / "dataset"),
        "sources": [{"name": "synthetic", "shards": "nowhere"}],
        "rules": [
            {"name": "clusters", "vectors": _VECTORS, "num_clusters": options.clusters},
            {"name": "semdedup", "vectors": _VECTORS, "max_similarity": options.max_similarity},
        ],
        "engine": {"num_workers": options.workers},
    }
    config = validate(tree, CurateConfig, label="semdedup")
    with Engine(config.engine) as engine, PeakMemory() as memory:
        start = time.perf_counter()
        table = decide(config, pa.Table.from_pylist(rows, schema=SCANNED), "", engine)
        seconds = time.perf_counter() - start
        cpu = sum(map(_cpu_seconds, workers_below(os.getpid())))
    kept = sum(table["num_kept"].to_pylist())
    solutions = json.loads(WorkFolder(config.work_dir).solutions_file.read_text())
    clusters, found = solutions["clusters"], solutions["semdedup"]
    print(
        f"{options.rows:,} x {options.dim}: {kept:,} kept, {seconds:.0f} s with {options.workers} "
        f"workers, {options.rows / seconds:,.0f} samples/s; {cpu:.0f} CPU seconds of the workers; "
        f"{clusters['num_clusters']:,} clusters, the largest {found['largest_group']:,} samples"
    )
    for role, peak in sorted(memory.peaks.items()):
        print(f"  {role:<14} {peak / 1e6:>8.1f} MB PSS at most")


def main() -> int:
    """Print time and peaks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--max-similarity", type=float, default=0.95)
    parser.add_argument("--rows-a-shard", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the vectors go (default: TMPDIR)")
    options = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 would starve Ray's beside other work
    with tempfile.TemporaryDirectory(prefix="pairmill-semdedup-", dir=options.folder) as folder:
        _run(Path(folder), options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
