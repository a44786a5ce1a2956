"""Score: models judge the samples of every shard, once; what they find is thresholded often.

    look    (per shard)   make the index where there is none; say what of the scores is missing
    score   (per shard)   actors that hold a model add columns to the index, and vectors beside it

The model is injected: `make` builds a scorer in each actor, and nothing here imports torch. A score
knows what made it (`IndexInfo.made_by`, `VectorsInfo.made_by`): a rerun makes what is missing, and
the scores of another model or setting are never taken for it, nor replaced unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from configs.errors import DataError, UsageError
from curation.index import (
    IndexInfo,
    add_columns,
    read_index_file,
    read_index_info,
    remove_index_leftovers,
)
from curation.scan import InputShard, ScanTask, scan_shard
from curation.spans import SpanReader, open_tar
from curation.value_counts import FloatArray, ValueCounts, count_values
from curation.vectors import Vectors, read_vectors_info, write_vectors

if TYPE_CHECKING:  # a worker does not need it, and it takes long to import
    from curation.engine import Engine, Resources

NUM_NAMED = 5  # images that cannot be used, named of each shard
_COLUMNS = ["key", "caption", "image_offset", "image_size", "problem"]


class RawSample(NamedTuple):
    """A sample as it lies in its shard."""

    caption: str
    image: bytes


@dataclass(frozen=True)
class Output:
    """A column of the index that a score makes, or vectors beside it."""

    name: str
    made_by: str  # digest of all that the values depend on
    what: str  # the same for people
    is_vectors: bool = False


@dataclass
class Scores:
    """What a scorer found: one value or vector a sample, in their order.

    NaN: it has none. `bad`: samples whose image cannot be used, and why.
    """

    columns: dict[str, FloatArray] = field(default_factory=dict)
    vectors: dict[str, Vectors] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)


class Scorer(Protocol):
    """What judges samples. Built once an actor; a shard's result depends on nothing before it."""

    def score(
        self, samples: Iterable[RawSample], num_samples: int, names: frozenset[str]
    ) -> Scores:
        """Return the outputs `names` of the samples of one shard, read one after the other."""
        ...


@dataclass(frozen=True, kw_only=True)
class LookTask:
    """Say what a shard lacks of some outputs."""

    scan: ScanTask
    outputs: tuple[Output, ...]

    def __str__(self) -> str:
        return str(self.scan)


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What a shard has and lacks."""

    num_samples: int
    num_unreadable: int = 0
    quarantined: str | None = None
    missing: frozenset[str] = frozenset()
    foreign: frozenset[str] = frozenset()  # there, but made by something else
    columns: dict[str, ValueCounts] = field(default_factory=dict)


def look_at_shard(task: LookTask) -> Looked:
    """Make the index of a shard where there is none; say what of the outputs it lacks.

    An index that is there is kept, whatever its source is called: its scores go with it.
    """
    scanned = scan_shard(_keeping(task.scan))
    if scanned.quarantined:
        return Looked(num_samples=0, quarantined=scanned.quarantined)
    path, info = task.scan.input.index, scanned.info
    missing, foreign = set(), set()
    for output in task.outputs:
        maker = maker_of(path, info, output)
        if maker != output.made_by:
            missing.add(output.name)
        if maker is not None and maker != output.made_by:
            foreign.add(output.name)
    there = [o.name for o in task.outputs if not o.is_vectors and o.name not in missing]
    table = read_index_file(path, there) if there else None
    return Looked(
        num_samples=info.num_samples,
        num_unreadable=sum(info.unreadable.values()),
        missing=frozenset(missing),
        foreign=frozenset(foreign),
        columns={name: count_values(table[name]) for name in there} if table else {},
    )


def _keeping(task: ScanTask) -> ScanTask:
    known = read_index_info(task.input.index)
    if known is None:
        return task
    shard = InputShard(
        source=known.source,
        shard=known.shard,
        path=task.input.path,
        index=task.input.index,
        storage=task.input.storage,
    )
    return ScanTask(
        input=shard,
        max_image_pixels=known.max_image_pixels or task.max_image_pixels,
        captions=tuple(known.captions or task.captions),
    )


def maker_of(path: Path, info: IndexInfo, output: Output) -> str | None:
    """Return what made an output of a shard; "" where it does not say, None where it is missing."""
    if output.is_vectors:
        vectors = read_vectors_info(path, output.name)
        return None if vectors is None else vectors.made_by
    return info.made_by.get(output.name, "") if output.name in info.columns else None


@dataclass(frozen=True, kw_only=True)
class ScoreTask:
    """Make the missing outputs of one shard."""

    input: InputShard
    outputs: tuple[Output, ...]

    def __str__(self) -> str:
        return str(self.input)


@dataclass(frozen=True, kw_only=True)
class ScoredShard:
    """What scoring a shard came to."""

    num_samples: int
    num_bad: int
    bad: list[str]  # the first NUM_NAMED: key and why
    columns: dict[str, ValueCounts]


def score_shard(scorer: Scorer, task: ScoreTask) -> ScoredShard:
    """Score one shard and publish what was found: vectors, then columns.

    Raises:
        DataError: the shard or its index changed since it was looked at, or cannot be read.
    """
    path = task.input.index
    info = read_index_info(path)
    if info is None:
        raise DataError(f"{path}: the index is gone. Run the same line again: it is made anew.")
    table = read_index_file(path, _COLUMNS, digest=info.content)
    is_usable = table["problem"].is_null().to_numpy()
    rows = np.flatnonzero(is_usable)
    with open_tar(task.input.path, dict(task.input.storage)) as reader:
        if reader.fingerprint() != info.fingerprint:
            raise DataError(
                f"{task.input.path} is not the tar that its index is of: it changed. Run the same "
                "line again, which scans it again."
            )
        samples = _read(reader, table.filter(pa.array(is_usable)))
        names = frozenset(output.name for output in task.outputs)
        found = scorer.score(samples, len(rows), names)
    return _publish(task, info, table, rows, found)


def _read(reader: SpanReader, table: pa.Table) -> Iterator[RawSample]:
    for batch in table.to_batches(max_chunksize=1000):
        columns = (batch[name].to_pylist() for name in ("caption", "image_offset", "image_size"))
        for caption, offset, size in zip(*columns, strict=True):
            yield RawSample(caption, reader.read(offset, size))


def _publish(
    task: ScoreTask, info: IndexInfo, table: pa.Table, rows: npt.NDArray[Any], found: Scores
) -> ScoredShard:
    path, columns, makers = task.input.index, {}, {}
    for output in task.outputs:
        if output.is_vectors:
            vectors = found.vectors[output.name]
            spread = np.full((table.num_rows, vectors.shape[1]), np.nan, np.float16)
            spread[rows] = vectors
            write_vectors(path, output.name, spread, made_by=output.made_by)
        else:
            values = np.full(table.num_rows, np.nan, np.float32)
            values[rows] = found.columns[output.name]
            columns[output.name] = pa.array(values, mask=~np.isfinite(values))
            makers[output.name] = output.made_by
    if columns:
        add_columns(path, columns, info, made_by=makers)
    keys = table["key"].take(pa.array(rows)).to_pylist() if found.bad else []
    named = [f"{keys[at]} ({found.bad[at]})" for at in sorted(found.bad)[:NUM_NAMED]]
    return ScoredShard(
        num_samples=len(rows),
        num_bad=len(found.bad),
        bad=named,
        columns={name: count_values(column) for name, column in columns.items()},
    )


@dataclass
class ScoringReport:
    """What a job came to, over all shards, whenever they were scored."""

    outputs: tuple[Output, ...]
    num_shards: int = 0
    num_done_before: int = 0
    num_samples: int = 0
    num_unreadable: int = 0
    num_bad: int = 0  # of the shards scored now
    bad: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    columns: dict[str, ValueCounts] = field(default_factory=dict)

    def take(self, columns: Mapping[str, ValueCounts]) -> None:
        """Add what is known of a shard's columns."""
        for name, counts in columns.items():
            self.columns[name] = self.columns.get(name, ValueCounts()).add(counts)


def score(
    shards: Sequence[ScanTask],
    outputs: Sequence[Output],
    make: Callable[[Any], Scorer],
    argument: Any,
    *,
    engine: Engine,
    resources: Resources,
    replace: bool = False,
) -> ScoringReport:
    """Make the outputs that shards lack; `make(argument)` builds the scorer of an actor.

    Raises:
        UsageError: some outputs are there and made by something else, unless `replace`.
        DataError: no shard can be read, or a worker's storage fails.
    """
    outputs = tuple(outputs)
    remove_index_leftovers({shard.input.index.parent for shard in shards})
    report = ScoringReport(outputs, num_shards=len(shards))
    tasks = [LookTask(scan=shard, outputs=outputs) for shard in shards]
    missing: dict[int, frozenset[str]] = {}
    foreign: dict[int, frozenset[str]] = {}
    for position, looked in engine.map(look_at_shard, tasks, label="look"):
        report.num_samples += looked.num_samples
        report.num_unreadable += looked.num_unreadable
        report.take(looked.columns)
        if looked.quarantined:
            report.quarantined.append(f"{shards[position]}: {looked.quarantined}")
        elif looked.missing:
            missing[position] = looked.missing
        if looked.foreign:
            foreign[position] = looked.foreign
    if len(report.quarantined) == len(shards):
        raise DataError(f"no shard can be read; the first: {report.quarantined[0]}.")
    if foreign and not replace:
        _refuse(shards, outputs, foreign)
    report.quarantined.sort()
    report.num_done_before = len(shards) - len(missing) - len(report.quarantined)
    todo = [
        ScoreTask(
            input=shards[position].input,
            outputs=tuple(output for output in outputs if output.name in missing[position]),
        )
        for position in sorted(missing)
    ]
    if todo:
        actors = engine.map_actors(
            make, argument, score_shard, todo, label="score", resources=resources
        )
        bad: dict[int, list[str]] = {}
        for position, done in actors:
            report.take(done.columns)
            report.num_bad += done.num_bad
            bad[position] = [f"{todo[position]}: {sample}" for sample in done.bad]
        report.bad = [sample for position in sorted(bad) for sample in bad[position]]
    return report


def _refuse(
    shards: Sequence[ScanTask], outputs: Sequence[Output], foreign: Mapping[int, frozenset[str]]
) -> None:
    names = sorted({name for found in foreign.values() for name in found})
    now = "; ".join(f"{output.name}: {output.what}" for output in outputs if output.name in names)
    raise UsageError(
        f"{len(foreign)} of {len(shards)} shards hold {', '.join(names)} of another model or "
        f"setting (the first is {shards[min(foreign)]}). Now it would be {now}. Give the new "
        "scores names of their own, or set replace=true to make the old ones anew."
    )
