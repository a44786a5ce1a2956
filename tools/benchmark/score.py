"""Throughput of `pairmill score` against the bare encoder: `python -m tools.benchmark.score`.

One shard of JPEGs (224 to 640 pixels) with captions, one model (`--model`, a published shape with
random weights: speed does not depend on them), in one process, as an actor has it.

    ours    what an actor does of a shard: read, decode, preprocess, encode both, CLIP score and
            vectors, publish the index and the two files of vectors
    theirs  the same encoder on the same batches, pixels preprocessed in memory before the clock

The model computes in one thread on both sides. `beside`: decoding has another core, if there is
one, as on a GPU machine with enough of them; `same core`: the process is pinned to one, where
decoding takes from the model what it takes. Wanted is 0.90 of the bare encoder's rate.
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from curation.index import index_path, read_index
from curation.scan import InputShard, ScanTask, scan_shard
from curation.scoring import Output, ScoreTask, score_shard
from evaluation.encoder import Encoder, load_encoder
from evaluation.images import decode_image
from tools.benchmark.evaluation import make_model
from tools.benchmark.ratio import alternate
from tools.score.scorer import BatchScorer, ScorerSpec, build_scorer

WANTED = 0.9
NUM_PICTURES = 40
SECTIONS = ('{"name": "clip_score"}', '{"name": "embeddings"}')
COLUMNS, VECTORS = ("clip_score",), ("clip_image", "clip_text")


def make_shard(path: Path, num_samples: int) -> Path:
    """Write a tar of JPEGs and captions."""
    rng = np.random.default_rng(0)
    pictures = []
    for side in rng.integers(224, 640, NUM_PICTURES):
        small = rng.integers(0, 255, (side // 8, side // 8, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((side, side)).save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for n in range(num_samples):
            words = rng.integers(0, 5000, rng.integers(3, 14))
            caption = " ".join(f"word {word}" for word in words).encode()
            members = {"jpg": pictures[int(rng.integers(NUM_PICTURES))], "txt": caption}
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{n:06d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


class Bare:
    """The encoder on pixels that lie in memory."""

    def __init__(self, encoder: Encoder, shard: Path, batch_size: int) -> None:
        self._encoder = encoder
        index, data = read_index(shard), shard.read_bytes()
        spans = zip(*(index[n].to_pylist() for n in ("image_offset", "image_size")), strict=True)
        pixels = [encoder.transform(decode_image(data[at : at + size])) for at, size in spans]
        self._pixels = torch.split(torch.stack(pixels), batch_size)
        captions = index["caption"].to_pylist()
        starts = range(0, len(captions), batch_size)
        self._captions = [captions[start : start + batch_size] for start in starts]

    def __call__(self) -> None:
        """Encode all of it."""
        for pixels, captions in zip(self._pixels, self._captions, strict=True):
            self._encoder.encode_images(pixels)
            self._encoder.encode_texts(captions)


class Ours:
    """All that an actor does of one shard."""

    def __init__(self, scorer: BatchScorer, shard: Path) -> None:
        self._scorer = scorer
        index = index_path(shard)
        self._task = ScoreTask(
            input=InputShard(source="b", shard=shard.name, path=str(shard), index=index),
            outputs=tuple(
                Output(name, "benchmark", "benchmark", name in VECTORS)
                for name in (*COLUMNS, *VECTORS)
            ),
        )

    def __call__(self) -> None:
        """Score it."""
        done = score_shard(self._scorer, self._task)
        assert not done.num_bad, done.bad


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="ViT-B-32", help="small, or one of open_clip's shapes")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder, "model"), options.model)
        shard = make_shard(Path(folder, "00000.tar"), options.samples)
        task = InputShard(source="b", shard=shard.name, path=str(shard), index=index_path(shard))
        scan_shard(ScanTask(input=task))
        spec = ScorerSpec(
            sections=SECTIONS, checkpoint=str(model), batch_size=options.batch_size, num_threads=1
        )
        ours = Ours(build_scorer(spec), shard)
        theirs = Bare(load_encoder(str(model)), shard, options.batch_size)
        cores = os.sched_getaffinity(0)
        cases = {"same core": {min(cores)}}
        if len(cores) > 1:
            cases = {"beside": set(sorted(cores)[:2]), **cases}
        print(f"{options.model}, {options.samples} samples, batches of {options.batch_size}")
        for name, chosen in cases.items():
            for thread in map(int, os.listdir("/proc/self/task")):
                os.sched_setaffinity(thread, chosen)
            found = alternate(f"score, decoding {name}", ours, theirs, repeats=options.repeats)
            print(found.line(WANTED), flush=True)
            rates = (options.samples / found.ours_s, options.samples / found.theirs_s)
            print(f"  {rates[0]:,.1f} against {rates[1]:,.1f} samples/s", flush=True)


if __name__ == "__main__":
    main()
