"""The contract of a global rule, and the registry of them all.

A global rule sees the samples of all shards that survived the rules before it, and is one barrier:

    emit   (per shard)  columns that it needs of each surviving sample; they lie in the shard's
                        partial decisions
    solve  (driver)     one plain function with the whole pool in hand: passes over the shards
                        (`pool.map`) and tasks of its own (`pool.run`); returns a small JSON
                        object, leaves what is larger as files in `pool.folder`
    apply  (per shard)  a judgement of each surviving sample from its columns and the solution

Three examples of `solve`:
- balancing: `pool.map` a function that counts entries; add the counts up; save them in the folder;
- a top fraction: `pool.map` histograms of the scores until the threshold is known;
- de-duplication: `pool.map` a function that writes (key, rank, uid, shard) records of one shard to
  one file a partition, by hash of the key; `pool.run` one task a partition, which reads its files
  and writes what is dropped by shard; `apply` reads what belongs to its shard.

Rules of the game:
- Functions given to the pool are module-level functions (they travel to other processes); their
  results are small, come in any order, and must be merged so that the order does not matter.
- Memory: a worker holds one shard or one partition. The driver holds nothing that grows with
  samples; a few bytes a shard are right.
- Restarts: `pool.folder` has the digest of all inputs in its name. A run that was killed finds its
  files there again. Publish each by rename (configs.publish), and skip what is there.
- Randomness: configs.draws with `pool.seed` and uids; ties are decided by uid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from configs.registry import Registry
from curation.arrow import read_parquet
from curation.filters.base import Judgement
from curation.index import read_index_file
from curation.vectors import read_vectors

KEPT = "kept"
Result = TypeVar("Result")
Task = TypeVar("Task")
Argument = TypeVar("Argument")


@dataclass(frozen=True, kw_only=True)
class Place:
    """One shard of the pool: who it is, and where its files lie."""

    number: int  # its position among the shards of the job, in canonical order
    source: str
    shard: str  # relative to the root of its source
    index: Path
    index_digest: str
    partial: Path  # the partial decisions of the phase that ended with `emit`
    vectors: str = ""  # NAME=DIGEST of those that the rules use (vectors.py)

    def __str__(self) -> str:
        return f"{self.source}/{self.shard}"


class ShardPart:
    """What a global rule sees of one shard: the samples that reached it, in tar order."""

    def __init__(
        self, place: Place, *, label: str, seed: int, table: pa.Table | None = None
    ) -> None:
        self.place = place
        self.label = label  # of the rule
        self.seed = seed
        self._table = table  # the partial decisions, where they are in memory already

    @property
    def number(self) -> int:
        """Position of the shard among those of the job, in canonical order."""
        return self.place.number

    @cached_property
    def is_left(self) -> pa.Array:
        """Mask over the rows of the index: which reached this rule."""
        return pc.equal(self._columns(["verdict"])["verdict"], KEPT).combine_chunks()

    @property
    def num_samples(self) -> int:
        """Samples that reached this rule."""
        return int(pc.sum(self.is_left).as_py() or 0)

    def emitted(self, *names: str) -> pa.Table:
        """Return `uid` and the named columns that `emit` returned, one row a sample left."""
        table = self._columns(["uid", *(f"{self.label}.{name}" for name in names)])
        return table.rename_columns(["uid", *names]).filter(self.is_left).combine_chunks()

    def values(self, *names: str) -> pa.Table:
        """Return columns of the decisions by their full names, one row a sample left."""
        return self._columns(list(names)).filter(self.is_left).combine_chunks()

    def vectors(self, name: str) -> npt.NDArray[np.float16]:
        """Return the vectors called `name` (one of the rule's `vectors`), a row a sample left.

        A row without a vector is not finite, or zero (vectors.has_vector).
        """
        known = dict(item.split("=") for item in self.place.vectors.split())
        if not known[name]:
            return np.zeros((0, 0), np.float16)  # the shard has no samples
        vectors = read_vectors(self.place.index, name, digest=known[name])
        left: npt.NDArray[np.float16] = vectors[self.is_left.to_numpy(zero_copy_only=False)]
        return left

    def index(self, *names: str) -> pa.Table:
        """Return the named columns of the index, one row a sample left."""
        table = read_index_file(self.place.index, list(names), digest=self.place.index_digest)
        return table.filter(self.is_left).combine_chunks()

    def _columns(self, names: list[str]) -> pa.Table:
        if self._table is not None:
            return self._table.select(names)
        return read_parquet(self.place.partial, names)


class Pool(Protocol):
    """All shards, as `solve` sees them: it runs on the driver, the functions on workers."""

    label: str
    seed: int
    folder: Path  # for files of the rule; on a rerun with the same inputs it is the same
    num_shards: int
    num_samples: int  # samples that reached the rule

    def map(
        self, function: Callable[[ShardPart, Argument], Result], argument: Argument, *, step: str
    ) -> Iterator[tuple[int, Result]]:
        """Yield (number of the shard, function(part, argument)) for all shards as they complete.

        `argument` travels to every shard: keep it small, and leave what is large in the folder.
        `step` names the pass in the progress bar.
        """
        ...

    def run(
        self, function: Callable[[Task], Result], tasks: Sequence[Task], *, step: str, unit: str
    ) -> Iterator[tuple[int, Result]]:
        """Yield (position of the task, function(task)) for tasks of the rule's own."""
        ...


@dataclass(frozen=True)
class Solution:
    """What `solve` found: `values` (JSON; they stand in the report) and the files in `folder`."""

    values: dict[str, Any]
    folder: Path


def warnings_of(solutions: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what the solutions of a job (label -> values) warn of: "LABEL: what"."""
    return [f"{label}: {said}" for label, v in solutions.items() for said in v.get("warnings", ())]


class GlobalRule(Protocol):
    """A rule that judges each sample by the whole pool. See above; small and picklable or not:
    it is built anew in each worker, once.
    """

    # A rule may have attributes `needs`: columns that the scan must compute (columns.py), `scored`:
    # columns that `pairmill score` must have made, and `vectors`: names of vectors of the samples
    # (vectors.py). All are sets of names.

    @property
    def emit_digest(self) -> str:
        """What the result of `emit` depends on, in one line, files by their content.

        Partial decisions are used again while it is the same.
        """
        ...

    @property
    def solve_digest(self) -> str:
        """What `solve` and `apply` depend on beyond the emitted columns, seed and label."""
        ...

    def emit(self, samples: pa.Table) -> dict[str, pa.Array]:
        """Return columns of the samples: one entry a row of `samples`, in its order.

        `samples` are rows of the index, with the values of the rules before as `RULE.VALUE`. The
        columns go into the decision table as `RULE.NAME`; one whose name starts with "_" is
        dropped when the rule has been applied.
        """
        ...

    def solve(self, pool: Pool) -> dict[str, Any]:
        """Return the solution as a small JSON object; larger things lie in `pool.folder`.

        `warnings` in it are sentences for the user: what came out other than asked for.
        """
        ...

    def apply(self, part: ShardPart, solution: Solution) -> Judgement:
        """Judge the samples of one shard that reached this rule, in their order."""
        ...


global_rules = Registry[GlobalRule]("global rule")
