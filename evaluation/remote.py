"""Files on remote storage: fetched once into the cache by fsspec, then read as local ones.

A file is published when it is whole, so that a killed download is not mistaken for one; several
processes may fetch at once. What `checksums` names is verified.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

import fsspec

from configs.errors import DataError
from configs.progress import progress
from configs.publish import published_file
from evaluation.tar import file_sha256

_OPTIONAL = ("classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt")
_SPLITS = ("test", "train", "val")
_MAX_TARS = 100_000


def is_remote(path: str) -> bool:
    """Whether a path names remote storage (`https://`, `s3://`, ...)."""
    return "://" in path


def local_copy(url: str, cache: Path) -> Path:
    """Return where the copy of a remote folder or file lies below the cache."""
    name = url.rstrip("/").rsplit("/", 1)[-1]
    return cache / "datasets" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def exists(url: str) -> bool:
    """Whether a remote file is there. Raises DataError where the storage cannot be asked."""
    try:
        system, path = fsspec.core.url_to_fs(url)
        return bool(system.exists(path))
    except (OSError, ImportError, ValueError) as error:
        raise DataError(
            f"{url} cannot be asked for: {error}. Check the address, the network and "
            "that fsspec has the package for this kind of storage."
        ) from None


def fetch_folder(url: str, cache: Path) -> Path:
    """Fetch a dataset folder of the CLIP_benchmark layout; return the local folder."""
    url = url.rstrip("/")
    folder = local_copy(url, cache)
    for name in _OPTIONAL:
        _fetch(f"{url}/{name}", folder / name, required=False)
    for split in _SPLITS:
        count = folder / split / "nshards.txt"
        if not _fetch(f"{url}/{split}/nshards.txt", count, required=split == "test"):
            continue
        text = count.read_text(encoding="utf-8", errors="replace").strip()
        number = int(text) if text.isdecimal() and len(text) < 8 else 0
        with progress(f"fetch {url}/{split}", total=number, unit="tars") as bar:
            for place in range(min(number, _MAX_TARS)):
                _fetch(f"{url}/{split}/{place}.tar", folder / split / f"{place}.tar")
                bar.advance()
    return folder


def fetch_file(url: str, cache: Path) -> Path:
    """Fetch one file; return the local path."""
    path = local_copy(url, cache) / url.rsplit("/", 1)[-1]
    _fetch(url, path)
    return path


def _fetch(url: str, path: Path, *, required: bool = True) -> bool:
    if path.exists():
        return True
    try:
        with fsspec.open(url, "rb") as source, published_file(path) as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except FileNotFoundError:
        if required:
            raise DataError(
                f"{url} is not there; expected a dataset in the CLIP_benchmark layout."
            ) from None
        return False
    except (OSError, ImportError, ValueError) as error:
        raise DataError(
            f"{url} cannot be fetched: {error}. What is fetched is kept; run the same line again."
        ) from None
    return True


def verify(folder: Path, checksums: Mapping[str, str]) -> None:
    """Raise DataError where a file of the folder is missing or has another sha256."""
    for name, expected in checksums.items():
        path = folder / name
        if not path.is_file():
            raise DataError(f"checksums: {path} is missing. Copy the dataset again.")
        found = file_sha256(path)
        if found != expected:
            raise DataError(
                f"checksums: {path} has the sha256 {found}, expected {expected}: it is damaged or "
                "another version. Remove it and copy (or fetch) it again."
            )
