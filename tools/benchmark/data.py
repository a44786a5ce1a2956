"""Data loading against webdataset and open_clip, each ratio measured in one run.

    python -m tools.benchmark.data [--samples 2000] [--tar PHOTOS.tar] [--captions CAPTIONS.tsv.gz]

One thread each, CPU seconds, so that what else runs on the machine counts less. The pictures are
JPEGs of 500 x 375 pixels at quality 85, made of the photographs of --tar (mosaics, so that they
have the detail of a photograph of that size) or of noise.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")  # before torch is imported

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from curation.manifest import Manifest, manifest_of_tars, read_index
from pretrain.data.augment import ImageTransform
from pretrain.data.batch import BatchPlan, SampleForm
from pretrain.data.dataset import Source, Sources
from pretrain.data.loader import BatchDataset
from pretrain.data.order import SampleOrder
from pretrain.data.reader import ShardReader
from pretrain.model.tokenizer import Tokenizer
from pretrain.model.torchvision_ops import ensure_torchvision
from pretrain.reduction.image import RandomPatches
from pretrain.reduction.text import TextReduction, truncate
from tools.benchmark.ratio import Ratio

_SHARD = 1_000
_SCALE = (0.9, 1.0)  # open_clip's RandomResizedCrop
_JUMP = """
import time
import numpy as np
from pretrain.data.order import SampleOrder
from pretrain.reduction.image import RandomPatches
from pretrain.reduction.text import TextReduction, truncate
sizes = np.full(100_000, 10_000)
start = time.perf_counter()
order = SampleOrder(sizes, seed=0, digest="d", window_shards=64)
order.locate(np.arange(2_500_000_000, 2_500_004_096))
seconds = time.perf_counter() - start
status = dict(line.split(":", 1) for line in open("/proc/self/status"))  # not getrusage: it keeps
print(seconds, int(status["VmHWM"].split()[0]) // 1024)  # the peak of the process that forked us
"""


def cpu_seconds(function: Callable[[], object]) -> float:
    """Return the CPU seconds of one call, this thread's and its system calls'."""
    start = time.process_time()
    function()
    return time.process_time() - start


def alternate(
    name: str, ours: Callable[[], object], theirs: Callable[[], object], *, repeats: int = 5
) -> Ratio:
    """As ratio.alternate, in CPU seconds."""
    pairs = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(repeats)]
    ratios = sorted(b / a for a, b in pairs)
    spread = (ratios[-1] - ratios[0]) / ratios[len(ratios) // 2]
    return Ratio(name, min(a for a, _ in pairs), min(b for _, b in pairs), spread)


def photographs(tar: Path | None) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Return tiles of 125 x 125 pixels: the middles of photographs, or smoothed noise."""
    tiles: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    if tar is not None and tar.is_file():
        with tarfile.open(tar) as file:
            for member in file:
                if member.name.endswith(".jpg") and len(tiles) < 400:
                    data = file.extractfile(member)
                    assert data is not None
                    image = np.asarray(Image.open(data).convert("RGB"))
                    tiles.append(image[10:135, 10:135])
    rng = np.random.default_rng(0)
    while len(tiles) < 100:
        small = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        tiles.append(np.asarray(small.resize((125, 125), Image.Resampling.BICUBIC)))
    return tiles


def make_shards(folder: Path, tiles: list[Any], captions: list[str], samples: int) -> Manifest:
    """Write tars of 1,000 samples, and their indexes and manifest."""
    rng = np.random.default_rng(1)
    for shard in range(-(-samples // _SHARD)):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(_SHARD * shard, min(samples, _SHARD * shard + _SHARD)):
                chosen = rng.integers(0, len(tiles), 12)
                rows = [np.hstack([tiles[t] for t in chosen[r : r + 4]]) for r in (0, 4, 8)]
                picture = io.BytesIO()
                Image.fromarray(np.vstack(rows)).save(picture, "JPEG", quality=85)
                caption = captions[i % len(captions)].encode()
                for extension, data in (("jpg", picture.getvalue()), ("txt", caption)):
                    info = tarfile.TarInfo(f"{i:07d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return manifest_of_tars(folder)


def read_captions(path: Path | None) -> list[str]:
    """Return raw web captions, or made ones."""
    if path is None or not path.is_file():
        return [f"a photograph of {i} red houses by the sea, No. {i * 7919}" for i in range(5000)]
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n").split("\t")[-1] for line in file][:10_000]


def read_ours(manifest: Manifest) -> Callable[[], None]:
    """Every sample in window order, by pread: what a worker does without decoding."""
    source = Source(manifest, str(manifest.folder), 1.0)

    def run() -> None:
        order = SampleOrder(
            manifest.samples_per_shard, seed=0, digest=manifest.digest, window_shards=4
        )
        reader = ShardReader(source, max_open_shards=64)
        for first in range(0, manifest.num_samples, 256):
            end = min(first + 256, manifest.num_samples)
            place = order.locate(np.arange(first, end))
            for shard, row in zip(place.shard.tolist(), place.row.tolist(), strict=True):
                reader.read(shard, row)
        reader.close()

    return run


def read_floor(manifest: Manifest) -> Callable[[], None]:
    """The system calls of `read_ours` and nothing else: the kernel's copies, its physical limit."""
    order = SampleOrder(manifest.samples_per_shard, seed=0, digest=manifest.digest, window_shards=4)
    place = order.locate(np.arange(manifest.num_samples))
    spans = []
    for shard in manifest.shards:
        index = read_index(shard.path, ["image_offset", "image_size"])
        spans.append((index["image_offset"].to_pylist(), index["image_size"].to_pylist()))
    calls = [
        (s, spans[s][1][r], spans[s][0][r])
        for s, r in zip(*map(np.ndarray.tolist, place), strict=True)
    ]

    def run() -> None:
        descriptors = [os.open(shard.path, os.O_RDONLY) for shard in manifest.shards]
        for shard, size, offset in calls:
            os.pread(descriptors[shard], size, offset)
        for descriptor in descriptors:
            os.close(descriptor)

    return run


def read_theirs(manifest: Manifest) -> Callable[[], None]:
    """Every sample as it stands in the tars: webdataset's sequential reading."""
    tars = [str(shard.path) for shard in manifest.shards]

    def run() -> None:
        for sample in wds.WebDataset(tars, shardshuffle=False):
            assert {"jpg", "txt"} <= sample.keys()

    return run


def decode_ours(manifest: Manifest, pixels: int, samples: int) -> Callable[[], None]:
    """Whole batches of 64 as a worker makes them: read, decode, crop, tokenize."""
    image = ImageTransform(image_size=pixels, scale=_SCALE, max_image_pixels=10**8)
    plan = BatchPlan(
        seed=0, global_batch_size=64, rank=0, world_size=1, window_shards=4, patch_rows=14,
        image_reduction=RandomPatches(0.0), text_reduction=TextReduction(truncate()),
    )  # fmt: skip
    sources = Sources((Source(manifest, str(manifest.folder), 1.0),))
    dataset = BatchDataset(sources, SampleForm(image=image), Tokenizer.clip(77), plan)

    def run() -> None:
        for consumed in range(0, samples, 64):
            dataset.batch(consumed)

    return run


def decode_theirs(manifest: Manifest, pixels: int, samples: int) -> Callable[[], None]:
    """open_clip's own pipeline: webdataset, PIL, its training transform, its tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transform import AugmentationCfg, image_transform

    tars = [str(shard.path) for shard in manifest.shards]
    transform = image_transform(pixels, is_train=True, aug_cfg=AugmentationCfg(scale=_SCALE))
    tokenizer = SimpleTokenizer()

    def run() -> None:
        pipeline = wds.DataPipeline(
            wds.SimpleShardList(tars),
            wds.tarfile_to_samples(),
            wds.shuffle(500, initial=100),
            wds.decode("pilrgb"),
            wds.rename(image="jpg", text="txt"),
            wds.map_dict(image=transform, text=lambda text: tokenizer(text)[0]),
            wds.to_tuple("image", "text"),
            wds.batched(64),
        )
        seen = 0
        for image, _ in pipeline:
            seen += len(image)
            if seen >= samples:
                return

    return run


def jump() -> tuple[float, int]:
    """Reach the middle of epoch 3 of a billion samples in a new process: seconds, MiB resident."""
    done = subprocess.run([sys.executable, "-c", _JUMP], capture_output=True, text=True, check=True)
    seconds, mebibytes = done.stdout.split()
    return float(seconds), int(mebibytes)


def lines(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Yield the lines of the table as they are measured."""
    from open_clip.tokenizer import SimpleTokenizer

    captions = read_captions(options.captions)
    manifest = make_shards(folder, photographs(options.tar), captions, options.samples)
    per_image = manifest.num_bytes // manifest.num_samples
    yield f"{manifest.num_samples:,} JPEGs of 500 x 375, {per_image:,} bytes each in the tar"
    reading = alternate("read, no decoding: window order / sequential webdataset",
                        read_ours(manifest), read_theirs(manifest))  # fmt: skip
    yield reading.line(5.0)
    floor = min(cpu_seconds(read_floor(manifest)) for _ in range(5))
    yield (
        f"    the limit: pread of the pictures alone, in the same order, takes {floor:.3f} s, "
        f"{reading.theirs_s / floor:.2f}x"
    )
    ours, theirs = Tokenizer.clip(77), SimpleTokenizer()
    texts = [captions[i : i + 64] for i in range(0, len(captions), 64)]
    tokens = alternate(
        "tokenize: Rust BPE / open_clip (words cached)",
        lambda: [ours(text) for text in texts],
        lambda: [theirs(text) for text in texts],
    )
    yield tokens.line(1.8)
    for pixels, wanted in ((224, 2.0), (112, 3.5)):
        decoding = alternate(
            f"decode to {pixels} px and tokenize / open_clip's pipeline",
            decode_ours(manifest, pixels, options.samples),
            decode_theirs(manifest, pixels, options.samples),
            repeats=3,
        )
        yield decoding.line(wanted)
        rate, others = options.samples / decoding.ours_s, options.samples / decoding.theirs_s
        yield f"    {rate:,.0f} and {others:,.0f} samples a second and core"
    yield entropy_floor(manifest, options.samples)
    seconds, mebibytes = jump()
    verdict = "ok" if seconds < 1 and mebibytes < 500 else "SHORT"
    yield f"jump into epoch 3 of 1e9 samples: {seconds:.3f} s, {mebibytes} MiB  {verdict}"


def entropy_floor(manifest: Manifest, samples: int) -> str:
    """Say what reading and entropy decoding alone take: the part that no scaling saves."""
    import simplejpeg

    reader = ShardReader(Source(manifest, str(manifest.folder), 1.0), max_open_shards=64)
    pictures = [reader.read(0, row).image for row in range(min(samples, 250))]

    def eighth() -> None:
        for picture in pictures:
            simplejpeg.decode_jpeg(picture, min_height=47, min_width=63)

    def whole() -> None:
        for picture in pictures:
            simplejpeg.decode_jpeg(picture)

    floor = min(cpu_seconds(eighth) for _ in range(5)) / len(pictures)
    full = min(cpu_seconds(whole) for _ in range(5)) / len(pictures)
    return (
        f"    the limit: libjpeg-turbo decodes {1 / full:,.0f} a second whole, {1 / floor:,.0f} at "
        "1/8, where the Huffman codes are nearly all that is left"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--tar", type=Path, help="photographs to make the pictures of")
    parser.add_argument("--captions", type=Path, help="a .tsv.gz with captions in its last column")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ensure_torchvision()  # for open_clip
    with tempfile.TemporaryDirectory(prefix="pairmill-benchmark-") as folder:
        for line in lines(options, Path(folder)):
            print(line, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"peak resident memory of the benchmark: {peak} MiB")


if __name__ == "__main__":
    main()
