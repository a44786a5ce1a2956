"""The work folder: what the stages hand to each other, beside the dataset folder (docs/formats.md).

OUTPUT.work/
    scanned.parquet          scan: one row an input shard
    partial/PHASE/SOURCE/SHARD   decide: verdicts up to a global rule, and what that rule needs
    solved/LABEL-DIGEST/     decide: the solution of a global rule (solution.json, files of its own)
    solutions.json           decide: label -> solution, of all global rules
    decisions/SOURCE/SHARD   decide: one row a sample
    decided.parquet          decide: one row an input shard
    entry_counts.parquet     decide: entry, before, after
    plan-DIGEST/             write: the order of the kept samples, block by block; and, until the
                             dataset is finished, what is kept of gzips, unpacked
    indexes/SOURCE/SHARD     scan: the indexes of tars on remote storage, without index_dir
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import DataError, UsageError
from configs.publish import published_file, remove_leftovers
from curation.arrow import read_parquet

_METADATA_KEY = b"pairmill"

SCANNED = pa.schema(
    [
        ("source", pa.string()),
        ("shard", pa.string()),  # relative to the root of its source
        ("path", pa.string()),
        ("index", pa.string()),
        ("index_digest", pa.string()),
        ("num_samples", pa.int64()),
        ("num_bytes", pa.int64()),
        ("fingerprint", pa.string()),  # of the tar; null where it is quarantined
        ("is_gzip", pa.bool_()),
        ("ignored_members", pa.int64()),
        ("ignored", pa.string()),  # JSON: why -> members that belong to no sample
        ("repeated_keys", pa.int64()),
        ("unreadable", pa.string()),  # JSON: problem -> samples
        ("damage", pa.string()),
        ("quarantined", pa.string()),
    ]
)
DECIDED = pa.schema(
    [
        *(SCANNED.field(name) for name in ("source", "shard", "path", "index", "index_digest")),
        ("num_bytes", pa.int64()),
        ("fingerprint", pa.string()),
        ("is_gzip", pa.bool_()),
        ("decisions", pa.string()),
        ("inputs_digest", pa.string()),  # of all that the decisions depend on
        ("num_samples", pa.int64()),
        ("num_kept", pa.int64()),
        (
            "reasons",
            pa.string(),
        ),  # JSON: reason or problem -> samples not kept
    ]
)


def digest_of(*parts: object) -> str:
    """Return the sha256 of some values in canonical JSON."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def publish_table(path: Path, table: pa.Table, metadata: Mapping[str, Any] | None = None) -> None:
    """Publish a table as Parquet, with `metadata` as JSON in its header."""
    if metadata is not None:
        packed = json.dumps(metadata, sort_keys=True).encode()
        table = table.replace_schema_metadata({_METADATA_KEY: packed})
    with published_file(path) as file:
        pq.write_table(table, file, compression="zstd")


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a table; {} where there is none that can be read."""
    try:
        return dict(json.loads((pq.read_schema(path).metadata or {})[_METADATA_KEY]))
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return {}


def read_decisions(path: Path, columns: list[str], inputs_digest: str) -> pa.Table:
    """Return some columns of a decision table.

    Raises:
        DataError: it is not there, or comes of other decisions than those of `inputs_digest`.
    """
    known = read_metadata(path).get("inputs")
    if known != inputs_digest:
        why = "cannot be read" if known is None else "is not of the decisions that were last summed"
        raise DataError(
            f"{path} {why}: it was lost or changed since. Decide again: `stages=[decide]`, or "
            "leave `stages` out; what is done is not repeated."
        )
    return read_parquet(path, columns)


class WorkFolder:
    """Names the files of the work folder and reads the tables between the stages."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.solutions_file = folder / "solutions.json"
        self.entry_counts = folder / "entry_counts.parquet"

    def partial(self, phase: int, source: str, shard: str) -> Path:
        """Return where the partial decisions of an input shard lie after a phase of the rules."""
        stem = shard.removesuffix(".tar")
        return self.folder / "partial" / str(phase) / source / f"{stem}.parquet"

    def solved(self, label: str, digest: str) -> Path:
        """Return the folder for the solution of a global rule."""
        return self.folder / "solved" / f"{label}-{digest[:32]}"

    def solutions(self, label: str) -> list[Path]:
        """Return the folders of all solutions of a global rule."""
        return sorted((self.folder / "solved").glob(f"{label}-{'[0-9a-f]' * 32}"))

    def decisions(self, source: str, shard: str) -> Path:
        """Return where the decisions of an input shard lie."""
        return self.folder / "decisions" / source / f"{shard.removesuffix('.tar')}.parquet"

    def plan(self, digest: str) -> Path:
        """Return the folder of one plan of writing."""
        return self.folder / f"plan-{digest[:16]}"

    def publish_summary(self, name: str, table: pa.Table, inputs: str) -> pa.Table:
        """Publish what a stage says of every input shard; `inputs` is what it depended on."""
        publish_table(self.folder / f"{name}.parquet", table, {"inputs": inputs})
        return table

    def read_summary(self, name: str, *, stage: str, inputs: str) -> pa.Table:
        """Return what `stage` said of every input shard.

        Raises:
            UsageError: it has not run, or ran with other sources or rules.
        """
        path = self.folder / f"{name}.parquet"
        known = read_metadata(path).get("inputs")
        if known != inputs:
            why = "has not run yet" if known is None else "ran with another configuration"
            raise UsageError(
                f"stage {stage!r} {why} for this job ({path}). Run it first: `stages=[{stage}]`, "
                "or leave `stages` out: all run then, and nothing that is done is repeated."
            )
        return read_parquet(path)

    def remove_leftovers(self) -> None:
        """Remove the temporary files of killed runs."""
        if self.folder.is_dir():
            for folder in (self.folder, *self.folder.rglob("*/")):
                if folder.is_dir():
                    remove_leftovers(folder)
