"""A tiny dataset of real PNGs, and several ranks on one machine."""

from __future__ import annotations

import io
import json
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.load import validate
from curation.manifest import Manifest, manifest_of_tars
from pretrain.config import PretrainConfig
from pretrain.model.torchvision_ops import ensure_torchvision
from tests import warm

ensure_torchvision()  # tests import open_clip and torchvision before our own modules do
COLOURS = ("red", "green", "blue", "gray")
TINY_MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 8, "width": 32, "heads": 2, "layers": 2},
}


def png(colour: int, side: int, seed: int) -> bytes:
    """A noisy square of one colour."""
    noise = np.random.default_rng(seed).integers(0, 60, (side, side, 3))
    base = np.zeros(3, dtype=np.int64)
    base[colour % 3] = 180
    pixels = np.clip(noise + (90 if colour == 3 else base), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def make_dataset(folder: Path, shard_sizes: list[int]) -> Manifest:
    number = 0
    for shard, size in enumerate(shard_sizes):
        samples = []
        for _ in range(size):
            colour = number % 4
            caption = f"a {COLOURS[colour]} square number {number % 7}".encode()
            samples.append(
                (f"{number:05d}", {"png": png(colour, 16 + number % 9, number), "txt": caption})
            )
            number += 1
        write_tar(folder / f"{shard:05d}.tar", samples)
    return manifest_of_tars(folder)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """96 samples in five shards of unequal size."""
    return make_dataset(tmp_path_factory.mktemp("dataset"), [30, 7, 25, 1, 33])


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(TINY_MODEL))
    return path


def make_config(manifest: Manifest, model: Path, output: Path, **changes: object) -> PretrainConfig:
    tree = {
        "name": "test",
        "seed": 3,
        "output": str(output),
        "data": {"manifest": str(manifest.folder), "window_shards": 2, "num_workers": 0},
        "model": str(model),
        "objective": {"name": "clip"},
        "reduction": {"mask_ratio": 0.5},
        "optimizer": {"learning_rate": 0.003, "warmup_samples": 32},
        "engine": {"zero_stage": 0, "num_threads": 1},
        "global_batch_size": 16,
        "samples": 160,
        "intervals": {"log_samples": 16, "checkpoint_samples": 10_000},
        **changes,
    }
    return validate(tree, PretrainConfig, label="test")


def run_ranks(script: str, world_size: int, *arguments: str) -> str:
    """Run tests.pretrain.scripts.SCRIPT on gloo ranks of one thread; return rank 0's output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        warm.start(
            f"tests.pretrain.scripts.{script}",
            list(arguments),
            **common,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank in range(world_size)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    codes = [process.wait() for process in processes]
    assert codes == [0] * world_size, "\n".join(outputs)
    return outputs[0]
