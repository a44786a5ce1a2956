"""The vectors that the rules of a job use: every shard has them, all of one dimension."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from configs.errors import DataError
from curation.vectors import FindVectors, find_vectors

if TYPE_CHECKING:  # a worker does not need it, and it takes long to import
    from curation.engine import Engine

VECTORS = "vectors"


def with_vectors(shards: pa.Table, names: Sequence[str], engine: Engine) -> pa.Table:
    """Return the table of scanned shards with a column of "NAME=DIGEST ..." of their vectors.

    Raises:
        DataError: a shard lacks some, or two shards have them of different models.
    """
    texts = [""] * len(shards)
    if names:
        first: dict[str, tuple[int, str, str]] = {}
        tasks = [FindVectors(Path(p), tuple(names)) for p in shards["index"].to_pylist()]
        for i, found in engine.map(find_vectors, tasks, label="vectors"):
            texts[i] = found.text
            for name, dim in found.dims.items():
                maker = found.makers[name]
                other, of, where = first.setdefault(name, (dim, maker, str(tasks[i])))
                if (dim, maker) != (other, of):
                    raise DataError(
                        f"vectors {name!r} have {dim} dimensions at {tasks[i]} (made by "
                        f"{maker[:16]!r}) and {other} at {where} (by {of[:16]!r}): two models or "
                        "settings made them. Make those of one model for all shards: `pairmill "
                        "score`, or read shards of one model only."
                    )
    return shards.append_column(VECTORS, pa.array(texts, pa.string()))
