"""Shards of synthetic pairs for benchmarks."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def make_shards(folder: Path, num_shards: int, per_shard: int) -> list[Path]:
    """Write tars of JPEGs of 20 to 80 KB (some 50 MB a thousand), a `.json` and a `.txt` each."""
    rng = np.random.default_rng(0)
    pictures = []
    for side in rng.integers(224, 640, 40):
        encoded, small = io.BytesIO(), rng.integers(0, 255, (side // 8, side // 8, 3), np.uint8)
        Image.fromarray(small).resize((side, side)).save(encoded, "JPEG", quality=90)
        pictures.append(encoded.getvalue())
    words = [f"word{n}" for n in range(5000)]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(num_shards):
        paths.append(folder / f"{shard:05d}.tar")
        with paths[-1].open("wb") as file:
            for n in range(per_shard):
                key, size = f"{shard:05d}{n:05d}", int(rng.integers(20 << 10, 80 << 10))
                picture = pictures[int(rng.integers(40))][: size - 16]
                picture += rng.bytes(size - len(picture))
                caption = " ".join(words[w] for w in rng.integers(0, 5000, rng.integers(3, 14)))
                fields = {"caption": caption, "url": f"http://example.com/{key}", "key": key}
                fields |= {"status": "success", "sha256": rng.bytes(32).hex(), "exif": "{}"}
                parts = {"jpg": picture, "json": json.dumps(fields).encode()}
                for extension, data in {**parts, "txt": caption.encode()}.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    file.write(info.tobuf(tarfile.USTAR_FORMAT))
                    file.write(data + bytes(-len(data) % 512))
            file.write(bytes(1024))
    return paths


def drop_from_cache(paths: Sequence[Path]) -> None:
    """Make the next read of some files one from the disk, which has nothing left to write."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
