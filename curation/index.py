"""The index of a shard: one Parquet file a tar, one row a sample (docs/formats.md, "Index").

It makes a tar randomly accessible and every later decision a column operation. scan.py makes it
from a tar, write.py while writing one; the trainer and the later stages read it here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from configs.errors import DataError
from configs.publish import published_file
from curation.arrow import read_columns

VERSION = 2
_METADATA_KEY = b"pairmill"
# Columns worth a dictionary; the others differ from row to row.
_FEW_VALUES = ["image_ext", "member_ext.list.element", "problem"]
# Numbers that go up by little: their differences are shorter.
_DELTA = dict.fromkeys(
    [
        *("image_offset", "image_size", "width", "height"),
        *(f"member_{what}.list.element" for what in ("start", "offset", "size")),
    ],
    "DELTA_BINARY_PACKED",
) | {"key": "DELTA_BYTE_ARRAY"}
_LEFTOVER_SECONDS = 3600

SCHEMA = pa.schema(
    [
        ("uid", pa.binary(16)),
        ("key", pa.string()),
        ("caption", pa.string()),
        ("captions", pa.list_(pa.string())),  # null: the one is the only one
        ("image_ext", pa.string()),
        ("image_offset", pa.int64()),
        ("image_size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("member_ext", pa.list_(pa.string())),
        ("member_start", pa.list_(pa.int64())),
        ("member_offset", pa.list_(pa.int64())),
        ("member_size", pa.list_(pa.int64())),
        ("problem", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """What an index says about its shard as a whole."""

    source: str
    shard: str  # path relative to the root of its source
    num_bytes: int  # of the tar
    num_samples: int
    unreadable: dict[str, int] = field(default_factory=dict)  # problem -> samples
    ignored_members: int = 0
    ignored: dict[str, int] = field(default_factory=dict)  # why -> members of no sample
    repeated_keys: int = 0  # samples whose key came before in the shard
    is_gzip: bool = False  # offsets are those of the tar inside
    damage: str | None = None  # what broke the tar, and at which byte
    max_image_pixels: int | None = None  # the limit that the scan used
    captions: list[str] | None = None  # the places that the scan looked for captions in
    fingerprint: str | None = None  # of the tar (see `fingerprint_of`): is it still the same one?
    plan: str | None = None  # of a shard that write.py made: the digest of what decided its content
    digest: str | None = None  # of a shard that write.py made: xxh3-128 of the tar
    # xxh3-128 of what SCHEMA holds, and of each other column (columns.py, scores): write_index's.
    content: str = ""
    columns: dict[str, str] = field(default_factory=dict)
    # Of each column that `pairmill score` made: a digest of all that its values depend on.
    made_by: dict[str, str] = field(default_factory=dict)
    version: int = VERSION


def index_path(shard: Path | str) -> Path:
    """Return where the index of a tar lies: `00000.tar` has `00000.index.parquet` beside it."""
    shard = Path(shard)
    return shard.with_name(shard.name.removesuffix(".tar") + ".index.parquet")


def write_index(path: Path, samples: pa.Table, info: IndexInfo) -> IndexInfo:
    """Publish the index of one shard; `samples` has the columns of SCHEMA, and any others behind.

    Return `info` with the digests of the content; those that it has already are not made again.
    """
    others = [name for name in samples.column_names if name not in SCHEMA.names]
    identity = (info.source, info.shard, info.num_bytes, info.fingerprint, info.plan)
    content = info.content or _content_digest(samples.select(SCHEMA.names), *identity)
    new = {n: _content_digest(samples.select([n])) for n in others if n not in info.columns}
    info = replace(info, content=content, columns=dict(sorted({**info.columns, **new}.items())))
    samples = samples.select([*SCHEMA.names, *info.columns])
    metadata = {_METADATA_KEY: json.dumps(asdict(info), sort_keys=True).encode()}
    with published_file(path) as file:
        pq.write_table(
            samples.replace_schema_metadata(metadata),
            file,
            compression="lz4",  # half the time of zstd, and scans go by its time
            use_dictionary=_FEW_VALUES,
            column_encoding=_DELTA,
            write_statistics=False,
        )
    return info


def add_columns(
    path: Path,
    columns: Mapping[str, pa.Array],
    info: IndexInfo,
    *,
    made_by: Mapping[str, str] | None = None,
) -> IndexInfo:
    """Add columns to the index in the file `path`, in place of those of the same names.

    All else in it stays. `info` is what is known of it; `made_by` tells what made each column.

    Raises:
        DataError: it is not the index that `info` speaks of.
    """
    table = read_index_file(path, digest=info.content)
    now = read_index_info(path) or info  # another job may have added columns meanwhile
    kept = {name: digest for name, digest in now.columns.items() if name not in columns}
    base = table.select(SCHEMA.names).cast(SCHEMA)  # Parquet names the items of a list otherwise
    for name in kept:
        base = base.append_column(name, table[name])
    for name, column in columns.items():
        base = base.append_column(name, column)
    makers = {name: maker for name, maker in now.made_by.items() if name not in columns}
    return write_index(
        path, base, replace(now, columns=kept, made_by={**makers, **(made_by or {})})
    )


def _content_digest(table: pa.Table, *others: object) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
        stream.write_table(table.replace_schema_metadata(None).combine_chunks())
    hasher = xxhash.xxh3_128(json.dumps(others).encode())
    hasher.update(sink.getvalue())
    return hasher.hexdigest()


def info_of(schema: pa.Schema) -> IndexInfo | None:
    """Return what an index's schema says of its shard; None: no index of this version."""
    try:
        fields = json.loads((schema.metadata or {})[_METADATA_KEY])
        return IndexInfo(**fields) if fields["version"] == VERSION else None
    except (KeyError, TypeError, ValueError):
        return None


def read_index_info(path: Path) -> IndexInfo | None:
    """Return what the index file `path` says about its shard; None where there is no usable one."""
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException, UnicodeEncodeError):  # the last: a name Arrow cannot hold
        return None
    if set(SCHEMA.names) - set(schema.names):
        return None
    return info_of(schema)


def remove_index_leftovers(folders: Iterable[Path]) -> None:
    """Remove the unfinished indexes and vectors of killed runs that lie directly in some folders.

    Only those of an hour ago and more: another job may be indexing the same tars now.
    """
    for folder in folders:
        for path in (*folder.glob(".*.index.parquet.tmp-*"), *folder.glob(".*.index.*.npy.tmp-*")):
            with suppress(OSError):  # a read-only folder, or another job was faster
                if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                    path.unlink()


def read_index(shard_path: Path | str, columns: list[str] | None = None) -> pa.Table:
    """Return the index of a tar: one row a sample, in tar order.

    Raises:
        DataError: there is no index beside the tar, or it is not one.
    """
    return read_index_file(index_path(shard_path), columns)


def digest_of_index(info: IndexInfo, columns: Iterable[str] = ()) -> str:
    """Return what the later stages know an index by: the digest of its content, then NAME=DIGEST
    of each column that they use besides SCHEMA.

    A column that another job adds changes nothing in it.
    """
    return " ".join([info.content, *(f"{name}={info.columns[name]}" for name in sorted(columns))])


def _has_digest(info: IndexInfo, digest: str) -> bool:
    content, *columns = digest.split(" ")
    used = (column.rpartition("=") for column in columns)
    return info.content == content and all(info.columns.get(n) == d for n, _, d in used)


def read_index_file(
    path: Path, columns: list[str] | None = None, *, digest: str | None = None
) -> pa.Table:
    """Return the index in the file `path`, all its columns or those named, in their order.

    Raises:
        DataError: it is not there, is no index, or is not the one of that digest.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: there is no such index. Every shard needs one beside it: "
            f"make it with `pairmill index {path.parent}`."
        )
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            missing = [name for name in columns or SCHEMA.names if name not in schema.names]
            info = info_of(schema)
            table = None if missing or info is None else read_columns(file, columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(_broken(path, str(error))) from None
    if table is None or info is None:
        lacks = f"it lacks {', '.join(missing)}" if missing else f"it is not of version {VERSION}"
        raise DataError(_broken(path, lacks))
    if digest is not None and not _has_digest(info, digest):
        raise DataError(
            f"{path} is not the index that was decided on: its shard was scanned again since. "
            "Decide again: `stages=[decide]`, or leave `stages` out."
        )
    return table.combine_chunks()


def _broken(path: Path, why: str) -> str:
    return f"{path} is not a readable index ({why}). Remove it, and `pairmill index` makes it anew."
