"""Small real things: dataset folders, an open_clip model of few weights, a run folder of ours."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pretrain.checkpoint import seal
from pretrain.model.clip import ClipModel
from pretrain.model.tokenizer import Tokenizer

import open_clip  # isort: skip

SMALL_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
COLORS = ("red", "green", "blue", "white", "black", "yellow")
RGB = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (255, 255, 0))
Member = tuple[str, bytes]


def png(seed: int, color: int, size: tuple[int, int] = (20, 24)) -> bytes:
    """Return a noisy picture of one colour, with stripes as wide as the colour says."""
    noise = np.random.default_rng(seed).integers(0, 40, (*size, 3))
    stripes = 50 + 50 * np.sin(np.arange(size[1]) * (color + 1) * np.pi / size[1])
    pixels = np.asarray(RGB[color]) // 3 + noise + stripes[None, :, None].astype(int)
    pixels = pixels.astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[Member]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_classification(folder: Path, *, num_images: int = 18, num_tars: int = 2) -> Path:
    """Write a dataset of coloured pictures, six classes, two templates."""
    for number in range(num_tars):
        members: list[Member] = []
        for i in range(number, num_images, num_tars):
            members += [(f"{i:06d}.png", png(i, i % 6)), (f"{i:06d}.cls", b"%d" % (i % 6))]
        write_tar(folder / "test" / f"{number}.tar", members)
    (folder / "test" / "nshards.txt").write_text(f"{num_tars}\n")
    (folder / "classnames.txt").write_text("\n".join(COLORS) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} picture\nthe colour {c}\n")
    return folder


def write_retrieval(folder: Path, *, num_images: int = 12) -> Path:
    """Write pictures with one to three captions each."""
    members: list[Member] = []
    for i in range(num_images):
        lines = [f"picture {i} in {COLORS[i % 6]}", f"number {i}", "one more"][: 1 + i % 3]
        members += [(f"{i:06d}.png", png(i, i % 6)), (f"{i:06d}.txt", "\n".join(lines).encode())]
    write_tar(folder / "test" / "0.tar", members)
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder


def write_reference(folder: Path, *, num_images: int = 12) -> Path:
    """Write training data as WebDataset tars."""
    members: list[Member] = []
    for i in range(num_images):
        caption = f"a {COLORS[i % 6]} picture, number {i}"
        members += [(f"{i:05d}.png", png(100 + i, i % 6)), (f"{i:05d}.txt", caption.encode())]
    write_tar(folder / "00000.tar", members)
    return folder


@pytest.fixture(scope="session")
def classification(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classification(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="session")
def retrieval_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_retrieval(tmp_path_factory.mktemp("data") / "captions")


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reference(tmp_path_factory.mktemp("data") / "train")


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that open_clip made, as somebody else would hand it over."""
    folder = tmp_path_factory.mktemp("model") / "foreign"
    folder.mkdir()
    torch.manual_seed(0)
    model = open_clip.CLIP(**SMALL_CONFIG)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"size": [16, 16], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}
    description = {"model_cfg": SMALL_CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ours with one checkpoint."""
    run = tmp_path_factory.mktemp("runs") / "run"
    checkpoint = run / "checkpoints" / "samples-000000001280"
    (checkpoint / "model").mkdir(parents=True)
    torch.manual_seed(1)
    config = {**SMALL_CONFIG, "text_cfg": {**SMALL_CONFIG["text_cfg"], "vocab_size": 64}}
    model = ClipModel(config)
    model.save(checkpoint / "model", dict(model.named_parameters()))
    captions = [f"a {color} picture" for color in COLORS]
    Tokenizer.train_words(captions, vocab_size=64, context_length=8).save(checkpoint / "model")
    record = {"samples_seen": 1280, "step": 10, "skipped_samples": 0, "config_digest": "c"}
    record |= {"manifest_digest": "m", "world_size": 1, "threads": 1, "zero_stage": 0}
    record |= {"device": "cpu", "versions": {}}
    seal(checkpoint, record, {})
    (run / "checkpoints" / "latest").write_text(f"{checkpoint.name}\n")
    return run


@pytest.fixture
def broken_copy(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a classification dataset with changed files."""

    def write(**files: str | bytes | None) -> Path:
        folder = write_classification(tmp_path / "broken")
        for name, content in files.items():
            path = folder / {"nshards": "test/nshards.txt", "tar": "test/1.tar"}.get(
                name, f"{name}.txt"
            )
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content.encode() if isinstance(content, str) else content)
        return folder

    return write
