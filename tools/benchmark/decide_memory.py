"""Peak memory and time of `decide` on few and on many rows: memory must not grow with the pool.

`python -m tools.benchmark.decide_memory [--rules {balance,dedup}] [--rows 2000000 20000000]`

Synthetic indexes (uid, caption, sizes, spans; about 60 bytes a row on disk) are written to a
temporary folder, then the decide stage runs over them in a process of its own with two Ray workers:

balance  caption length, a top fraction, and MetaCLIP with target_size, so three barriers
dedup    equal images, equal captions and near texts; a tenth of the rows has a picture, a tenth a
         caption that comes again and again

The proportional set size (PSS, what a process would free by ending) of the driver, of the workers
and of Ray's own processes is sampled every 0.2 s. Larger runs must stay within 10 % of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.load import validate
from curation.index import SCHEMA, IndexInfo, digest_of_index, write_index
from curation.work import SCANNED

_ALLOWED = 1.10
_INTERVAL_S = 0.2
_SCANNED_FILE = "scanned.parquet"
_NUM_WORDS = 20_000
_WORDS_A_CAPTION = 8
_HASH = "image_hash"
_COLUMNS = {"balance": (), "dedup": (_HASH,)}  # of the index, that the rules need besides


def _repeated(rng: np.random.Generator, values: pa.Array, pool: int) -> pa.Array:
    """Put values of one pool, the same for all shards, in place of every tenth."""
    shared = np.random.default_rng(pool).bytes(16 * 10_000)
    few = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), 10_000, [None, pa.py_buffer(shared)])
    if pa.types.is_string(values.type):
        few = pa.array([value.hex() for value in few.to_pylist()])
    where = pa.array(np.arange(len(values)) % 10 == pool)
    some = few.take(pa.array(rng.integers(0, len(few), len(values))))
    return pc.if_else(where, some, values)


def _write_shard(path: Path, number: int, num_rows: int, words: pa.Array, rules: str) -> IndexInfo:
    """Publish the index of one synthetic shard; words follow Zipf's law."""
    rng = np.random.default_rng(number)
    ranks = (_NUM_WORDS ** rng.random(num_rows * _WORDS_A_CAPTION)).astype(np.int64) - 1
    offsets = np.arange(num_rows + 1) * _WORDS_A_CAPTION
    lists = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), words.take(pa.array(ranks)))
    captions = pc.binary_join(lists, " ")
    starts = np.arange(num_rows, dtype=np.int64) * 51_200
    one = pa.array(np.arange(num_rows + 1), pa.int32())

    def single(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(one, values)

    def random_bytes() -> pa.Array:
        buffers = [None, pa.py_buffer(rng.bytes(16 * num_rows))]
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), num_rows, buffers)

    columns = {
        "uid": random_bytes(),
        "key": pa.array([f"{number:05d}{row:05d}" for row in range(num_rows)]),
        "caption": _repeated(rng, captions, 1) if rules == "dedup" else captions,
        "captions": pa.nulls(num_rows, SCHEMA.field("captions").type),
        "image_ext": pa.array(["jpg"] * num_rows),
        "image_offset": pa.array(starts + 512),
        "image_size": pa.array(rng.integers(20_000, 50_000, num_rows)),
        "width": pa.array(rng.integers(100, 1000, num_rows), pa.int32()),
        "height": pa.array(rng.integers(100, 1000, num_rows), pa.int32()),
        "member_ext": single(pa.array(["jpg"] * num_rows)),
        "member_start": single(pa.array(starts)),
        "member_offset": single(pa.array(starts + 512)),
        "member_size": single(pa.array(np.full(num_rows, 50_000))),
        "problem": pa.nulls(num_rows, pa.string()),
    }
    table = pa.table([columns[name] for name in SCHEMA.names], schema=SCHEMA)
    if rules == "dedup":
        table = table.append_column(_HASH, _repeated(rng, random_bytes(), 0))
    name = f"{number:06d}.tar"
    return write_index(
        path, table, IndexInfo(source="synthetic", shard=name, num_bytes=1, num_samples=num_rows)
    )


def _write_pool(folder: Path, num_rows: int, rows_a_shard: int, rules: str) -> None:
    """Write the indexes and the metadata; return the table that a scan would leave."""
    rng = np.random.default_rng(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [f"{''.join(rng.choice(list(letters), 4))}{i}" for i in range(_NUM_WORDS)]
    (folder / "metadata.txt").write_text("\n".join(words) + "\n")
    array, rows = pa.array(words), []
    for number in range(-(-num_rows // rows_a_shard)):
        size = min(rows_a_shard, num_rows - number * rows_a_shard)
        path = folder / "indexes" / f"{number:06d}.index.parquet"
        info = _write_shard(path, number, size, array, rules)
        rows.append(
            {
                "source": "synthetic",
                "shard": info.shard,
                "path": str(folder / info.shard),
                "index": str(path),
                "index_digest": digest_of_index(info, _COLUMNS[rules]),
                "num_samples": size,
                "num_bytes": 1,
                "ignored_members": 0,
                "unreadable": "{}",
            }
        )
    pq.write_table(pa.Table.from_pylist(rows, schema=SCANNED), folder / _SCANNED_FILE)


def _pss(pid: int) -> int:
    """Return the proportional set size of a process in bytes; 0 where it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _processes() -> dict[int, str]:
    """Return the processes below this one: pid -> role."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
            command = (
                (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            )
        except OSError:
            continue
        parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
        names[int(entry.name)] = command
    found = {os.getpid(): "driver"}
    grown = True
    while grown:
        new = {
            p: _role(names[p])
            for p, parent in parents.items()
            if parent in found and p not in found
        }
        found |= new
        grown = bool(new)
    return found


def _role(command: str) -> str:
    if command.startswith("ray::"):
        return "worker"
    return next((name for name in ("raylet", "gcs_server") if name in command), "other of ray")


class PeakMemory:
    """Samples the PSS of this process and its descendants: the largest of each role."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            for pid, role in _processes().items():
                self.peaks[role] = max(self.peaks.get(role, 0), _pss(pid))


def _rules(folder: Path, num_rows: int, rules: str) -> list[dict[str, Any]]:
    if rules == "dedup":
        return [{"name": "dedup", "by": ["image", "caption", "text"]}]
    balancer = {"name": "metaclip", "metadata": str(folder / "metadata.txt")}
    return [
        {"name": "caption_length", "min_words": 3},
        {"name": "top_fraction", "column": "caption_length.characters", "fraction": 0.9},
        {**balancer, "target_size": num_rows // 3},
    ]


def _run_child(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    from curation.arrow import keep_pandas_out
    from curation.config import CurateConfig
    from curation.decide import decide
    from curation.engine import Engine

    keep_pandas_out()  # as the `pairmill` command does
    num_rows = options.rows[0]
    # Another process makes the indexes: what it leaves in memory is not decide's.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        other.submit(_write_pool, folder, num_rows, options.rows_a_shard, options.rules).result()
    scanned = pq.read_table(folder / _SCANNED_FILE, partitioning=None)
    cap = {"cap": num_rows // 4} if options.rules == "balance" else {}
    tree = {
        "name": "memory",
        "output": str(folder / "dataset"),
        "sources": [{"name": "synthetic", "shards": "nowhere", **cap}],
        "rules": _rules(folder, num_rows, options.rules),
        "engine": {"num_workers": options.workers},
    }
    config = validate(tree, CurateConfig, label="decide_memory")
    start = time.perf_counter()
    with PeakMemory() as memory, Engine(config.engine) as engine:
        decided = decide(config, scanned, "", engine)
    seconds = time.perf_counter() - start
    kept = sum(decided["num_kept"].to_pylist())
    return {"rows": num_rows, "kept": kept, "seconds": seconds, "peaks": memory.peaks}


def _measure(num_rows: int, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="pairmill-memory-", dir=options.folder) as folder:
        line = [sys.executable, "-m", "tools.benchmark.decide_memory", "--child", folder]
        line += ["--rows", str(num_rows), "--rows-a-shard", str(options.rows_a_shard)]
        line += ["--workers", str(options.workers), "--rules", options.rules]
        done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Print peaks and ratios; return 1 where memory grew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rules", choices=list(_COLUMNS), default="balance")
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000_000, 20_000_000])
    parser.add_argument("--rows-a-shard", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the indexes go (default: TMPDIR)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(_run_child(options.child, options)))
        return 0
    is_short = False
    first: dict[str, int] = {}
    for num_rows in options.rows:
        result = _measure(num_rows, options)
        first = first or result["peaks"]
        print(
            f"{num_rows:,} rows: {result['kept']:,} kept, {result['seconds']:.0f} s, "
            f"{num_rows / result['seconds']:,.0f} rows/s, "
            f"{1e6 * result['seconds'] / num_rows:.1f} s a million rows"
        )
        for role, peak in sorted(result["peaks"].items()):
            ratio = peak / first[role]
            ours = role in ("driver", "worker")
            verdict = ("ok" if ratio <= _ALLOWED else "SHORT") if ours else "Ray's own"
            is_short |= verdict == "SHORT"
            print(f"  {role:<14} {peak / 1e6:>8.1f} MB PSS  {ratio:>5.2f}x  {verdict}", flush=True)
    return int(is_short)


if __name__ == "__main__":
    raise SystemExit(main())
