"""Tars to curate, good and broken, and one Ray for the whole session."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

SHARED = Path(__file__).resolve().parents[3] / "shared"


def png(width: int = 32, height: int = 32, shade: int = 128) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height), shade).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members, format: int = tarfile.USTAR_FORMAT) -> Path:
    """Write members: (name, bytes), or a TarInfo for what is no file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, data = member
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, caption: str, *, side: int = 32, shade: int = 128):
    fields = json.dumps({"caption": caption, "key": key}).encode()
    return [
        (f"{key}.png", png(side, side, shade)),
        (f"{key}.txt", caption.encode()),
        (f"{key}.json", fields),
    ]


def hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def tars():
    """The functions above, for tests that make their own shards."""

    return SimpleNamespace(png=png, write=write_tar, sample=sample, hashes=hashes, shared=SHARED)


@pytest.fixture(scope="session")
def ray_session():
    """One real Ray of two workers for all tests; Engine joins it."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 1024 * 1024,
    )
    yield
    ray.shutdown()


WORDS = [
    "red",
    "blue",
    "green",
    "big",
    "small",
    "cat",
    "dog",
    "house",
    "tree",
    "car",
    "sun",
    "moon",
]


@pytest.fixture(scope="session")
def pool(tmp_path_factory) -> Path:
    """Six shards of 40 samples; keys repeat from shard to shard; some captions and images fail."""
    folder = tmp_path_factory.mktemp("pool")
    for number in range(6):
        members = []
        for i in range(40):
            n = number * 40 + i
            caption = " ".join(["a", WORDS[n % 12], WORDS[n * n % 7], "thing"])
            if n % 10 == 3:
                caption = "x"
            members += sample(f"{i:04d}", caption, side=8 if n % 10 == 5 else 32, shade=n % 256)
        write_tar(folder / "train" / f"{number:05d}.tar", members)
    (folder / "metadata.txt").write_text("\n".join([*WORDS, "a", "thing", "unseen"]) + "\n")
    return folder


@pytest.fixture(scope="session")
def configure(pool):
    """Make a configuration over the pool that writes below a folder, with changes."""
    from configs.load import validate
    from curation.config import CurateConfig

    def make(folder: Path, **changes):
        tree = {
            "name": "test",
            "seed": 7,
            "output": str(folder / "dataset"),
            "index_dir": str(folder / "indexes"),
            "sources": [{"name": "pool", "shards": str(pool / "train")}],
            "rules": [
                {"name": "caption_length", "min_words": 2},
                {"name": "image_size", "min_side": 16},
                {"name": "metaclip", "metadata": str(pool / "metadata.txt"), "t": 10},
            ],
            "write": {"samples_per_shard": 25, "shards_per_block": 4},
        }
        return validate({**tree, **changes}, CurateConfig, label="test")

    return make


@pytest.fixture
def job(configure, tmp_path):
    """Make a configuration that writes below the test's own folder."""
    return partial(configure, tmp_path)


@pytest.fixture(scope="session")
def finished(configure, tmp_path_factory, ray_session):
    """One job over the pool: (configuration, report)."""
    from curation.job import curate

    config = configure(tmp_path_factory.mktemp("finished"))
    return config, curate(config)
