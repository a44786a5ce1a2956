"""The manifest: a folder that names the shards of a dataset (docs/formats.md, "Manifest").

It is the only thing that pretraining is pointed at:

    manifest = read_manifest("runs/demo/dataset")
    for shard in manifest.shards:
        rows = read_index(shard.path, ["image_offset", "image_size", "caption"])
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from configs.errors import DataError, UsageError
from configs.progress import progress
from configs.publish import publish_text, published_file
from curation.arrow import read_parquet
from curation.index import index_path, read_index, read_index_info, remove_index_leftovers
from curation.index import info_of as index_info
from curation.scan import DEFAULT_MAX_IMAGE_PIXELS, InputShard, Scanned, ScanTask, scan_shard

__all__ = [
    "Manifest", "Shard", "Shards", "index_info", "index_path", "manifest_of_tars", "read_index",
    "read_manifest", "write_manifest",
]  # fmt: skip

VERSION = 1
_SCHEMA = pa.schema(
    [("path", pa.string()), ("num_samples", pa.int64()), ("num_bytes", pa.int64()),
     ("digest", pa.string())]
)  # fmt: skip
_KEYS = (
    "version", "name", "num_shards", "num_samples", "num_bytes", "config_digest", "parents",
    "plan", "created_by", "digest",
)  # fmt: skip


class Shard(NamedTuple):
    """One tar of a dataset."""

    path: Path
    num_samples: int
    num_bytes: int
    digest: str  # "xxh3-128:<hex>" of the tar


class Shards(Sequence[Shard]):
    """The shards of a manifest; built one at a time, since a million of them are normal."""

    def __init__(self, folder: Path, table: pa.Table) -> None:
        self._folder = folder
        self._table = table.combine_chunks()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, position: int) -> Shard: ...
    @overload
    def __getitem__(self, position: slice) -> list[Shard]: ...
    def __getitem__(self, position: int | slice) -> Shard | list[Shard]:
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        if not -len(self) <= position < len(self):
            raise IndexError(f"shard {position} of {len(self)}")
        path, *rest = (self._table[name][position].as_py() for name in _SCHEMA.names)
        return Shard(self._folder / path, *rest)

    def __iter__(self) -> Iterator[Shard]:
        for batch in self._table.to_batches(max_chunksize=10_000):
            for path, *rest in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                yield Shard(self._folder / path, *rest)


@dataclass(frozen=True)
class Manifest:
    """A dataset: its shards, totals and identity."""

    folder: Path
    name: str
    num_samples: int
    num_bytes: int
    config_digest: str | None
    parents: tuple[str, ...]
    created_by: str
    plan: str | None  # digest of what decided its content; None where the tars are others'
    digest: str  # sha256 over the rows of shards.parquet: the identity of the dataset
    table: pa.Table  # shards.parquet

    @property
    def num_shards(self) -> int:
        """Number of tars."""
        return int(self.table.num_rows)

    @cached_property
    def shards(self) -> Shards:
        """The tars, in order."""
        return Shards(self.folder, self.table)

    def path(self, position: int) -> Path:
        """Return where a shard lies."""
        return self.shards[position].path

    @property
    def samples_per_shard(self) -> npt.NDArray[np.int64]:
        """Number of samples of each shard."""
        counts: npt.NDArray[np.int64] = self.table["num_samples"].to_numpy()
        return counts


def shards_digest(table: pa.Table) -> str:
    """Return the identity of a dataset: sha256 over the rows of shards.parquet."""
    digest = hashlib.sha256()
    for batch in table.to_batches(max_chunksize=10_000):
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            digest.update("\0".join(map(str, row)).encode() + b"\n")
    return digest.hexdigest()


def software_version() -> str:
    """Return the version of pairmill for the records that it writes."""
    try:
        return f"pairmill {importlib.metadata.version('pairmill')}"
    except importlib.metadata.PackageNotFoundError:
        return "pairmill (run from its source tree)"


def write_manifest(
    folder: Path | str,
    shards: Iterable[Shard],
    *,
    name: str,
    config_digest: str | None = None,
    parents: Sequence[str] = (),
    plan: str | None = None,
) -> Manifest:
    """Publish shards.parquet, then manifest.json, whose presence says that the dataset is complete.

    Paths below `folder` are written relative to it, others absolute.
    """
    folder = Path(folder)
    rows = [(_relative(shard.path, folder), *shard[1:]) for shard in shards]
    columns = list(zip(*rows, strict=True)) or [()] * len(_SCHEMA)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)]
    table = pa.table(arrays, schema=_SCHEMA)
    header = {
        "version": VERSION,
        "name": name,
        "num_shards": table.num_rows,
        "num_samples": sum(table["num_samples"].to_pylist()),
        "num_bytes": sum(table["num_bytes"].to_pylist()),
        "config_digest": config_digest,
        "parents": list(parents),
        "plan": plan,
        "created_by": software_version(),
        "digest": shards_digest(table),
    }
    (folder / "manifest.json").unlink(missing_ok=True)
    with published_file(folder / "shards.parquet") as file:
        pq.write_table(table, file, compression="zstd")
    publish_text(folder / "manifest.json", json.dumps(header, indent=2, ensure_ascii=False) + "\n")
    return _manifest(folder, header, table)


def _relative(path: Path, folder: Path) -> str:
    try:
        return str(Path(os.path.abspath(path)).relative_to(os.path.abspath(folder)))
    except ValueError:
        return os.path.abspath(path)


def _manifest(folder: Path, header: dict[str, Any], table: pa.Table) -> Manifest:
    return Manifest(
        folder=folder,
        name=header["name"],
        num_samples=header["num_samples"],
        num_bytes=header["num_bytes"],
        config_digest=header["config_digest"],
        parents=tuple(header["parents"]),
        created_by=header["created_by"],
        plan=header["plan"],
        digest=header["digest"],
        table=table,
    )


def read_manifest(folder: Path | str, *, check_files: bool = True) -> Manifest:
    """Read and check a dataset folder; the path of its manifest.json does as well.

    `check_files` looks at the presence and size of every shard (not at its digest).

    Raises:
        DataError: no folder, not a manifest, another version, totals or shards that do not fit.
    """
    folder = Path(folder)
    if folder.name == "manifest.json":
        folder = folder.parent
    header = _read_header(folder)
    try:
        table = read_parquet(folder / "shards.parquet", _SCHEMA.names).cast(_SCHEMA)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DataError(
            f"{folder / 'shards.parquet'} cannot be read ({error}); manifest.json needs it "
            "beside it. Make the dataset again."
        ) from None
    totals = {
        "num_shards": table.num_rows,
        "num_samples": sum(table["num_samples"].to_pylist()),
        "num_bytes": sum(table["num_bytes"].to_pylist()),
        "digest": shards_digest(table),
    }
    wrong = [
        f"{k}: {header[k]} there, {v} in shards.parquet"
        for k, v in totals.items()
        if header[k] != v
    ]
    if wrong:
        raise DataError(
            f"{folder}: manifest.json and shards.parquet do not belong together "
            f"({'; '.join(wrong)}). One was changed or copied alone: make the dataset again."
        )
    manifest = _manifest(folder, header, table.combine_chunks())
    if check_files:
        _check_files(manifest)
    return manifest


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such dataset folder. Make it with `pairmill curate`."
        )
    if not path.is_file():
        raise DataError(
            f"{folder} is not a dataset: it has no manifest.json. A curation that was stopped has "
            f"none yet (run it again); for tars that others wrote, run `pairmill index {folder}`."
        )
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        version = header["version"]
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{path} is not a manifest: expected a JSON object with `version`."
        ) from None
    if version != VERSION:
        raise DataError(
            f"{path}: version {version!r}; this pairmill reads version {VERSION}. "
            "Make the dataset again, or use the pairmill that wrote it."
        )
    missing = [key for key in _KEYS if key not in header]
    if missing:
        raise DataError(f"{path} is not a whole manifest: it lacks {', '.join(missing)}.")
    return dict(header)


def _check_files(manifest: Manifest) -> None:
    problems = []
    for shard in manifest.shards:
        try:
            num_bytes = shard.path.stat().st_size
        except OSError as error:
            problems.append(f"{shard.path}: {error.strerror}")
            continue
        if num_bytes != shard.num_bytes:
            problems.append(
                f"{shard.path}: {num_bytes:,} bytes, {shard.num_bytes:,} in the manifest"
            )
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise DataError(
            f"{manifest.folder}: {len(problems)} of {manifest.num_shards} shards are not as the "
            f"manifest says: {'; '.join(problems[:3])}{more}. Restore them, or make the "
            "dataset again."
        )


Mapper = Callable[
    [Callable[[ScanTask], Scanned], Sequence[ScanTask]], Iterable[tuple[int, Scanned]]
]


def _map_here(
    function: Callable[[ScanTask], Scanned], tasks: Sequence[ScanTask]
) -> Iterator[tuple[int, Scanned]]:
    with progress("index", total=len(tasks), unit="shards") as bar:
        for position, task in enumerate(tasks):
            result = function(task)
            bar.advance(1, samples=result.num_samples)
            yield position, result


def manifest_of_tars(
    folder: Path | str,
    shards: Sequence[Path] | None = None,
    *,
    name: str | None = None,
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
    map_shards: Mapper = _map_here,
) -> Manifest:
    """Make indexes and a manifest for tars that others wrote, in place, without rewriting them.

    `shards` are the tars (all below `folder` where it is None); the manifest goes into `folder`, an
    index beside each tar. Indexes that are there already are kept. `map_shards` runs the scans
    elsewhere: `Engine.map` over Ray, say. Samples that cannot be read keep their row and problem.

    Raises:
        UsageError: no tars there, or a curated dataset. DataError: a tar cannot be read at all.
    """
    folder = Path(folder)
    _refuse_curated(folder)
    found = sorted(folder.rglob("*.tar") if shards is None else shards)
    if not found:
        raise UsageError(f"{folder}: there is no .tar in it. Give a folder of WebDataset shards.")
    name = name or folder.resolve().name
    tasks = [_task(path, folder, name, max_image_pixels) for path in found]
    remove_index_leftovers({task.input.index.parent for task in tasks})
    listed: list[Shard | None] = [None] * len(tasks)
    for position, scanned in map_shards(scan_and_digest, tasks):
        if scanned.quarantined:
            raise DataError(
                f"{tasks[position]} cannot be read: {scanned.quarantined}. "
                "Mend it, or leave it out of the shards."
            )
        info = scanned.info
        digest = info.digest or ""
        listed[position] = Shard(found[position], info.num_samples, info.num_bytes, digest)
    return write_manifest(folder, [shard for shard in listed if shard], name=name)


def _refuse_curated(folder: Path) -> None:
    if (folder / "manifest.json").exists() and _read_header(folder)["config_digest"] is not None:
        raise UsageError(
            f"{folder} is a curated dataset: its manifest says how it was made, and it needs no "
            "index. If files of it are lost or changed, run its `pairmill curate` line again."
        )


def _task(path: Path, folder: Path, name: str, max_image_pixels: int) -> ScanTask:
    known = read_index_info(index_path(path))
    source, shard = (known.source, known.shard) if known else (name, _relative(path, folder))
    return ScanTask(
        input=InputShard(source=source, shard=shard, path=str(path), index=index_path(path)),
        max_image_pixels=(known and known.max_image_pixels) or max_image_pixels,
    )


def scan_and_digest(task: ScanTask) -> Scanned:
    """Scan one shard as scan_shard does; fill in the digest of its tar (which reads all of it)."""
    scanned = scan_shard(task)
    if scanned.quarantined or scanned.info.digest:
        return scanned
    with open(task.input.path, "rb") as file:
        hasher = xxhash.xxh3_128()
        while part := file.read(1 << 22):
            hasher.update(part)
    info = replace(scanned.info, digest=f"xxh3-128:{hasher.hexdigest()}")
    return replace(scanned, info=info)
