"""What a run trains on: one manifest or several with weights, on disk or in remote storage.

data: {manifest: /data/run1}                        a dataset folder (local or s3://bucket/run1)
data: {manifest: "/data/laion/{00000..00099}.tar"}  tars of others; indexed on first use
data: {mixture: [{manifest: a, weight: 3}, {manifest: b, weight: 1}]}
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
from braceexpand import braceexpand

from configs.errors import ConfigError, DataError, UsageError
from configs.publish import published_file
from curation.manifest import Manifest, manifest_of_tars, read_manifest
from pretrain.data.mixture import shares_of
from pretrain.data.remote import RemoteFiles, is_remote

if TYPE_CHECKING:  # a worker need not import what a configuration may name
    from pretrain.config import DataConfig, SourceConfig


@dataclass(frozen=True)
class Source:
    """One manifest of a mixture; `root` is the folder or URL that its relative paths start from."""

    manifest: Manifest
    root: str
    weight: float

    def location(self, shard: int) -> str:
        """Return the path or URL of a shard."""
        path: str = self.manifest.table["path"][shard].as_py()
        return path if is_remote(path) or os.path.isabs(path) else f"{self.root}/{path}"

    @property
    def is_remote(self) -> bool:
        """Whether any of the shards is in remote storage."""
        with_scheme = pc.match_substring(self.manifest.table["path"], "://")
        return is_remote(self.root) or bool(pc.any(with_scheme).as_py())


@dataclass(frozen=True)
class Sources:
    """The sources of a run, in the order of the configuration."""

    sources: tuple[Source, ...]

    def __iter__(self) -> Iterator[Source]:
        return iter(self.sources)

    @property
    def num_samples(self) -> int:
        """Samples of all sources, each counted once."""
        return sum(source.manifest.num_samples for source in self.sources)

    @property
    def digest(self) -> str:
        """The identity of the data: the manifest's digest; of a mixture, of digests and shares."""
        if len(self.sources) == 1:
            return self.sources[0].manifest.digest
        shares = shares_of([source.weight for source in self.sources])
        parts = [f"{s.manifest.digest} {n}\n" for s, n in zip(self.sources, shares, strict=True)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def describe(self) -> str:
        """Name the sources in words."""
        if len(self.sources) == 1:
            return f"{self.sources[0].manifest.num_samples:,} of {self.sources[0].root}"
        shares = shares_of([source.weight for source in self.sources])
        named = [
            f"{s.root} ({s.manifest.num_samples:,}, {n / sum(shares):.1%} of each batch)"
            for s, n in zip(self.sources, shares, strict=True)
        ]
        return f"{self.num_samples:,} of {', '.join(named)}"


def open_sources(data: DataConfig, *, first_rank: bool = True) -> Sources:
    """Open every manifest that the `data` section names; what has no index is indexed.

    On the other ranks (`first_rank` false) nothing is written and no shard is looked at: rank 0 has
    done so.

    Raises DataError and UsageError with what to do.
    """
    return Sources(tuple(_open(data, wanted, first_rank) for wanted in data.wanted))


def _open(data: DataConfig, wanted: SourceConfig, first_rank: bool) -> Source:
    name = wanted.manifest.removesuffix("/manifest.json").rstrip("/")
    if is_remote(name):
        folder = _fetch_manifest(data, name)
        source = Source(read_manifest(folder, check_files=False), name, wanted.weight)
        _check_remote(data, source)
    else:
        folder = _index_bare_tars(name) if first_rank else _manifest_folder(name)
        manifest = read_manifest(folder, check_files=False)
        source = Source(manifest, str(folder), wanted.weight)
        if source.is_remote:
            _check_remote(data, source)
        elif first_rank:
            read_manifest(folder)  # looks at every shard
    if source.manifest.num_samples == 0:
        raise DataError(f"{name}: the manifest has no samples. Curate again with looser rules.")
    return source


def _is_pattern(name: str) -> bool:
    return name.endswith(".tar") or "{" in name


def _manifest_folder(name: str) -> Path:
    """Return where the manifest of a location lies: in it, or for a pattern beside its tars."""
    if not _is_pattern(name):
        return Path(name)
    pattern = os.path.abspath(name)
    first = Path(next(iter(braceexpand(pattern))))
    return first.parent / f".manifest-{hashlib.sha256(pattern.encode()).hexdigest()[:16]}"


def _index_bare_tars(name: str) -> Path:
    """Make index and manifest of tars that have none; return the manifest's folder."""
    folder = _manifest_folder(name)
    if (folder / "manifest.json").is_file():
        return folder
    if not _is_pattern(name):
        unfinished = (folder / ".pairmill-unfinished").exists()  # of a curation: read_manifest says
        if folder.is_dir() and not unfinished and any(folder.rglob("*.tar")):
            manifest_of_tars(folder)
        return folder
    tars = [Path(path).absolute() for path in braceexpand(name)]
    missing = [str(path) for path in tars if not path.is_file()]
    if missing:
        raise UsageError(
            f"{name}: {len(missing)} of its {len(tars)} tars are not there, the first {missing[0]}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    manifest_of_tars(folder, tars, name=Path(name).name)
    return folder


def _fetch_manifest(data: DataConfig, url: str) -> Path:
    """Copy manifest.json and shards.parquet of a remote dataset; return the local folder."""
    if url.endswith(".tar"):
        raise UsageError(
            f"{url}: remote tars need a manifest beside them. Run `pairmill index` where they are "
            "on disk and upload it with them, or read them with `source: streaming`."
        )
    files = RemoteFiles(retries=data.remote.retries)
    folder = data.remote.path / f"manifest-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("shards.parquet", "manifest.json"):
        content = files.read(f"{url}/{name}", 0, files.size(f"{url}/{name}"))
        with published_file(folder / name) as file:
            file.write(content)
    return folder


def _check_remote(data: DataConfig, source: Source) -> None:
    """Refuse a cache that cannot hold two windows: every sample would be a request of its own."""
    sizes = np.sort(source.manifest.table["num_bytes"].to_numpy())[::-1]
    needed = int(sizes[: 2 * data.window_shards].sum())
    if needed > data.remote.cache_bytes:
        raise ConfigError(
            f"data.remote.cache_bytes: got {data.remote.cache_bytes:,}, but two windows of "
            f"{data.window_shards} shards of {source.root} take {needed:,} bytes. Raise it (three "
            "windows let the next one be fetched ahead), or lower data.window_shards."
        )
