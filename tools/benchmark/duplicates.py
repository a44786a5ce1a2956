"""Do vectors and perceptual hashes find the same near duplicates? An agreement table.

`python -m tools.benchmark.duplicates FOLDER [--vectors clip_image] [--similarity 0.9 0.95 0.98]`

FOLDER holds tars with an index and vectors beside them (`pairmill index`, `pairmill score`), such
as the one that `python -m tools.benchmark.poison --folder` leaves. `dedup` by phash and `semdedup`
run over it with one keep policy, each alone; a row says how many samples both drop, how many one
alone, and their Jaccard index. Neither is the truth: the report of such a job shows the groups.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from configs.load import validate
from curation.config import CurateConfig
from curation.engine import Engine
from curation.job import curate

_KEEP = ["resolution", "caption_length", "key"]
_SIMILARITIES = [0.9, 0.95, 0.98, 0.99, 0.995]


def dropped_by(folder: Path, output: Path, rules: list[dict[str, Any]]) -> set[str]:
    """Return the uids of the samples that the last of some rules drops."""
    tree = {
        "name": "duplicates",
        "output": str(output),
        "sources": [{"name": folder.resolve().name, "shards": str(folder)}],
        "rules": [{"name": "decodable"}, *rules],
        "stages": ["scan", "decide"],
        "engine": {"num_workers": 1},
    }
    config = validate(tree, CurateConfig, label="duplicates")
    curate(config)
    label, found = config.rule_labels()[-1], set()
    for path in config.work_dir.glob("decisions/**/*.parquet"):
        table = pq.read_table(path, columns=["uid", "reason"], partitioning=None)
        for uid, reason in zip(table["uid"].to_pylist(), table["reason"].to_pylist(), strict=True):
            if reason and reason.split("/")[0] == label:
                found.add(uid.hex())
    return found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vectors", default="clip_image")
    parser.add_argument("--clusters", type=int, default=10)
    parser.add_argument("--distance", type=int, default=3, help="of the perceptual hashes, bits")
    parser.add_argument("--similarity", type=float, nargs="+", default=_SIMILARITIES)
    options = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 would starve Ray's beside other work
    with tempfile.TemporaryDirectory(prefix="pairmill-duplicates-") as name, Engine():
        output = Path(name, "dataset")
        by_hash = {"name": "dedup", "by": ["phash"], "keep": _KEEP, "distance": options.distance}
        hashed = dropped_by(options.folder, output, [by_hash])
        print(f"phash, {options.distance} bits: {len(hashed):,} dropped")
        print(
            f"{'cosine':>7} {'dropped':>8} {'both':>7} {'hash alone':>11} {'vectors alone':>14}  J"
        )
        for similarity in options.similarity:
            rules = [
                {"name": "clusters", "vectors": options.vectors, "num_clusters": options.clusters},
                {
                    "name": "semdedup",
                    "vectors": options.vectors,
                    "max_similarity": similarity,
                    "keep": _KEEP,
                },
            ]
            near = dropped_by(options.folder, output, rules)
            both, either = len(hashed & near), len(hashed | near)
            print(
                f"{similarity:>7} {len(near):>8,} {both:>7,} {len(hashed - near):>11,} "
                f"{len(near - hashed):>14,}  {both / max(1, either):.2f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
