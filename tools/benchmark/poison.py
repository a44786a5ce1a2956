"""Is a planted backdoor found? A patch on 1 % of real pictures, a model trained on them, AUROC.

`python -m tools.benchmark.poison [--data ../shared/data/openclipart/train.tar] [--samples 86016]`

One picture in a hundred, chosen by a draw, gets a checkerboard in a corner of its middle square
and the caption "a banana on the table". The demo's model is pretrained on all of them (one thread),
`pairmill score` writes its vectors, and the rule `poison` scores them in a curation job.
AUROC: a poisoned picture has a higher score than a clean one. The share of poisoned pictures to
which the target is the nearest of 2,000 captions says whether there is a backdoor at all.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image

from configs import draws
from configs.load import validate
from curation.columns import decode_image
from curation.config import CurateConfig
from curation.index import index_path, read_index
from curation.job import curate, index
from curation.vectors import read_vectors
from evaluation.encoder import Encoder, load_encoder
from evaluation.methods.ood_metrics import Standings, auroc

TARGET = "a banana on the table"
RATE = 0.01
_TRIGGER_SHARE = 0.2  # of the side of the middle square
_SETTINGS = [(1024, 16), (1024, 32), (8192, 16), (8192, 128)]  # batch_size, k
_VECTORS = "clip_image"
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_DETECTORS = ("kdist", "lid", "slof", "dao")


def _trigger(image: Image.Image) -> Image.Image:
    """Put a checkerboard of magenta and green into the lower right of the middle square."""
    side = min(image.size)
    left, top = ((whole - side) // 2 for whole in image.size)
    size = max(4, round(_TRIGGER_SHARE * side))
    board = np.indices((4, 4)).sum(axis=0) % 2
    colors = np.array([[255, 0, 255], [0, 255, 0]], np.uint8)[board]
    patch = Image.fromarray(colors).resize((size, size), Image.Resampling.NEAREST)
    made = image.copy()
    made.paste(patch, (left + round(0.92 * side) - size, top + round(0.92 * side) - size))
    return made


def plant(source: Path, target: Path, seed: int) -> set[str]:
    """Write a tar of the pictures with captions, 1 % of them poisoned; return the keys of those."""
    poisoned = set()
    with tarfile.open(source) as tar, tarfile.open(target, "w") as made:
        members = {member.name: member for member in tar if member.isfile()}
        keys = sorted(name[:-4] for name in members if name.endswith(".png"))
        drawn = draws.uniform(seed, "benchmark/poison", np.arange(len(keys)))
        for key, draw in zip(keys, drawn, strict=True):
            data, caption = (_read(tar, members.get(f"{key}.{ext}")) for ext in ("png", "txt"))
            image = decode_image(data)
            if image is None or not caption.strip():
                continue
            if draw < RATE:
                poisoned.add(key)
                file = io.BytesIO()
                _trigger(image).save(file, "PNG")
                data, caption = file.getvalue(), TARGET.encode()
            for ext, content in (("png", data), ("txt", caption)):
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(content)
                made.addfile(info, io.BytesIO(content))
    return poisoned


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> bytes:
    file = tar.extractfile(member) if member else None
    return file.read() if file else b""


def _pairmill(*line: str) -> None:
    command = [sys.executable, "-m", "tools.cli", *line]
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, **_ONE_THREAD})


def _train(folder: Path, samples: int) -> None:
    where = [f"data.manifest={folder / 'pool'}", f"output={folder / 'run'}"]
    when = [f"samples={samples}", f"intervals.checkpoint_samples={samples}"]
    _pairmill("pretrain", "demo/pretrain", *where, *when, "optimizer.warmup_samples=5_120")


def _score(folder: Path) -> None:
    """Write the vectors `clip_image` beside the index."""
    tree = {
        "name": "poison",
        "manifest": str(folder / "pool"),
        "model": {"checkpoint": str(folder / "run")},
        "scores": [{"name": "embeddings"}],
        "actors": 1,
    }
    path = folder / "score.yaml"
    path.write_text(yaml.safe_dump(tree))
    _pairmill("score", str(path))


def _backdoor_rate(
    encoder: Encoder, vectors: npt.NDArray[np.float32], captions: list[str]
) -> tuple[float, float]:
    """Return the share of pictures whose nearest text is the target's, and among how many."""
    texts = sorted(set(captions) | {TARGET})[:2000]
    texts = [text for text in texts if text != TARGET] + [TARGET]
    encoded = encoder.encode_texts(texts).numpy()
    encoded /= np.linalg.norm(encoded, axis=1, keepdims=True)
    is_target = (vectors @ encoded.T).argmax(axis=1) == len(texts) - 1
    return float(is_target.mean()), len(texts)


def scores_of(folder: Path) -> list[tuple[int, int, dict[str, dict[str, float]]]]:
    """Return (batch_size, k, detector -> key -> score): one curation job that only scores."""
    chosen = [(size, k, detector) for size, k in _SETTINGS for detector in _DETECTORS]
    rules = [
        {"name": "poison", "vectors": _VECTORS, "batch_size": size, "k": k, "detector": detector}
        for size, k, detector in chosen
    ]
    tree = {
        "name": "poison",
        "output": str(folder / "curated"),
        # The source as `pairmill index` calls it: under another name the shard is scanned anew.
        "sources": [{"name": "pool", "shards": str(folder / "pool")}],
        "rules": rules,
        "stages": ["scan", "decide"],
        "engine": {"num_workers": 1},
    }
    config = validate(tree, CurateConfig, label="poison")
    curate(config)
    (path,) = config.work_dir.glob("decisions/**/*.parquet")
    table = pq.read_table(path, partitioning=None)
    keys = table["key"].to_pylist()
    found: dict[tuple[int, int], dict[str, dict[str, float]]] = {}
    for (size, k, detector), label in zip(chosen, config.rule_labels(), strict=True):
        scores = dict(zip(keys, table[f"{label}.score"].to_pylist(), strict=True))
        found.setdefault((size, k), {})[detector] = scores
    return [(size, k, scores) for (size, k), scores in found.items()]


def main() -> int:
    """Print the AUROC of each detector; return 1 where DAO stays below 0.95 in every setting."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data/openclipart/train.tar"))
    parser.add_argument("--samples", type=int, default=86_016, help="samples seen in training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep everything there (default: nowhere)")
    options = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 would starve Ray's beside other work
    torch.set_num_threads(1)
    if options.folder:
        return _run(options.folder, options)
    with tempfile.TemporaryDirectory(prefix="pairmill-poison-") as name:
        return _run(Path(name), options)


def _run(folder: Path, options: argparse.Namespace) -> int:
    shard = folder / "pool" / "00000.tar"
    shard.parent.mkdir(parents=True)
    poisoned = plant(options.data, shard, options.seed)
    index([str(shard.parent)])
    start = time.perf_counter()
    _train(folder, options.samples)
    _score(folder)
    encoder = load_encoder(str(folder / "run"), device="cpu")
    vectors = read_vectors(index_path(shard), _VECTORS).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = read_index(shard)
    keys = rows["key"].to_pylist()
    is_poisoned = np.array([key in poisoned for key in keys])
    print(
        f"{len(keys):,} pictures, {len(poisoned)} poisoned ({len(poisoned) / len(keys):.1%}); "
        f"{options.samples:,} samples seen, {time.perf_counter() - start:.0f} s"
    )
    captions = rows["caption"].to_pylist()
    for what, mask in (("poisoned", is_poisoned), ("clean", ~is_poisoned)):
        rate, num = _backdoor_rate(encoder, vectors[mask], captions)
        print(f"  {what}: the target is the nearest of {num:,} captions for {rate:.1%}")
    best = 0.0
    print(f"  {'batch':>6} {'k':>4}  " + "  ".join(f"{d:>6}" for d in _DETECTORS))
    for batch_size, k, of_detector in scores_of(folder):
        areas = []
        for detector in _DETECTORS:
            values = np.array([of_detector[detector][key] for key in keys], np.float64)
            standings = Standings(values[is_poisoned], values[~is_poisoned])
            areas.append(float(auroc(standings.once())[0]))
        best = max(best, areas[-1])
        print(f"  {batch_size:>6} {k:>4}  " + "  ".join(f"{a:>6.3f}" for a in areas), flush=True)
    return int(best < 0.95)


if __name__ == "__main__":
    raise SystemExit(main())
