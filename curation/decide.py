"""Decide for every sample whether it is kept: one pass over the shards a phase, barriers between.

    judge    (per shard)  apply the global rule of the phase before; filters in order; emit what the
                          next global rule needs                -> partial/PHASE/..., decisions/...
    solve    (driver)     the next global rule over the whole pool (global_rules/base.py)
                                                                -> solved/LABEL-DIGEST/

With no global rule that is one pass; with one, as a balancer, it is two. A rule sees only what no
rule before it dropped; its values are null for the others. Results lie on disk under the digest of
all that they depend on, and are used again while it is the same: with another `t` nothing is
matched again. A worker holds one shard (or one partition of a rule), the driver a few bytes a
shard.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from configs.errors import DataError
from configs.publish import publish_text
from curation.arrow import read_parquet
from curation.balancing.base import ENTRIES, IntArray, read_counts, sparse_counts
from curation.global_rules import ShardPart, Solution
from curation.global_rules.base import Place
from curation.index import read_index_file
from curation.needed_vectors import VECTORS, with_vectors
from curation.rules import Phase, Rule, Rules
from curation.verdicts import KEPT, Verdicts
from curation.work import DECIDED, WorkFolder, digest_of, publish_table, read_metadata

if TYPE_CHECKING:  # a worker needs neither, and they take long to import
    from curation.config import CurateConfig
    from curation.engine import Engine

SOLUTION = "solution.json"


@dataclass(frozen=True)
class Solved:
    """A global rule, and where its solution lies."""

    rule: Rule
    folder: Path

    def read(self) -> Solution:
        """Return the solution."""
        return Solution(json.loads((self.folder / SOLUTION).read_text())["values"], self.folder)


@dataclass(frozen=True, kw_only=True)
class JudgeTask:
    """Run one phase over one shard."""

    place: Place  # partial: what the phase before left of it
    result: Path
    result_digest: str  # of all that the result depends on
    solved: Solved | None  # the global rule before this phase
    phase: Phase
    seed: int
    entries: str | None  # last phase: the balancer's column of entry ids

    def __str__(self) -> str:
        return str(self.place)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What a phase left of a shard."""

    num_samples: int
    num_left: int
    reasons: dict[str, int]  # reason or problem -> samples that are out
    entries: tuple[IntArray, IntArray] | None = None  # last phase: of the kept samples; id, count


def judge_shard(task: JudgeTask) -> Judged:
    """Run one phase over one shard, or read what an earlier run left of it."""
    names = ["verdict", "reason", *([task.entries] if task.entries else [])]
    if read_metadata(task.result).get("inputs") == task.result_digest:
        table = read_parquet(task.result, names)
    else:
        table = _judge(task)
        publish_table(task.result, table, {"inputs": task.result_digest})
    is_kept = pc.equal(table["verdict"], KEPT)
    return Judged(
        num_samples=table.num_rows,
        num_left=int(pc.sum(is_kept).as_py() or 0),
        reasons=dict(sorted(Counter(table["reason"].drop_null().to_pylist()).items())),
        entries=sparse_counts(table[task.entries].filter(is_kept)) if task.entries else None,
    )


def _judge(task: JudgeTask) -> pa.Table:
    index = read_index_file(task.place.index, digest=task.place.index_digest)
    if task.solved is None:
        verdicts = Verdicts(index)
    else:
        table = read_parquet(task.place.partial).combine_chunks()
        verdicts = Verdicts(index, table)
        label, rule = task.solved.rule.label, task.solved.rule.build()
        part = ShardPart(task.place, label=label, seed=task.seed, table=table)
        verdicts.judge(label, rule.apply(part, task.solved.read()))
        verdicts.drop_scratch(label)
    for spec in task.phase.filters:
        verdicts.judge(spec.label, spec.build()(verdicts.left()))
    last = task.phase.ends_with
    if last is not None:
        verdicts.add(last.label, last.build().emit(verdicts.left()))
    return verdicts.table(is_final=last is None)


@dataclass(frozen=True)
class _PartTask:
    place: Place
    label: str
    seed: int
    function: Callable[[ShardPart, Any], Any]
    argument: Any

    def __str__(self) -> str:
        return str(self.place)


@dataclass(frozen=True)
class _OwnTask:
    function: Callable[[Any], Any]
    task: Any

    def __str__(self) -> str:
        return str(self.task)


@dataclass(frozen=True)
class _Value:
    num_samples: int
    value: Any


def _run_part(task: _PartTask) -> _Value:
    part = ShardPart(task.place, label=task.label, seed=task.seed)
    return _Value(part.num_samples, task.function(part, task.argument))


def _run_own(task: _OwnTask) -> _Value:
    return _Value(0, task.function(task.task))


class _Lazily(Sequence[Any]):
    """Tasks made when they are asked for: a million of them need not lie in the driver's memory."""

    def __init__(self, num_tasks: int, make: Callable[[int], Any]) -> None:
        self._num_tasks, self._make = num_tasks, make

    def __len__(self) -> int:
        return self._num_tasks

    def __getitem__(self, position: Any) -> Any:
        if not 0 <= position < self._num_tasks:
            raise IndexError(position)
        return self._make(position)


class EnginePool:
    """The pool of a global rule (global_rules.base.Pool) on an engine."""

    def __init__(
        self,
        engine: Engine,
        places: Sequence[Place],
        *,
        label: str,
        seed: int,
        folder: Path,
        num_samples: int,
    ) -> None:
        self.label, self.seed, self.folder = label, seed, folder
        self.num_samples, self.num_shards = num_samples, len(places)
        self._engine, self._places = engine, places

    def map(
        self, function: Callable[[ShardPart, Any], Any], argument: Any, *, step: str
    ) -> Iterator[tuple[int, Any]]:
        """See Pool."""
        tasks = _Lazily(
            len(self._places),
            lambda i: _PartTask(self._places[i], self.label, self.seed, function, argument),
        )
        for position, done in self._engine.map(_run_part, tasks, label=f"{self.label}: {step}"):
            yield self._places[position].number, done.value

    def run(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], *, step: str, unit: str
    ) -> Iterator[tuple[int, Any]]:
        """See Pool."""
        own = _Lazily(len(tasks), lambda i: _OwnTask(function, tasks[i]))
        label = f"{self.label}: {step}"
        for position, done in self._engine.map(_run_own, own, label=label, unit=unit):
            yield position, done.value


def _solve(rule: Rule, places: Sequence[Place], inputs: str, num_samples: int, job: _Job) -> Solved:
    """Solve a global rule, unless that is done; `inputs` is the digest of what it sees."""
    digest = digest_of(inputs, rule.label, rule.solve_digest, job.config.seed)
    folder = job.work.solved(rule.label, digest)
    path = folder / SOLUTION
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pool = EnginePool(
            job.engine,
            places,
            label=rule.label,
            seed=job.config.seed,
            folder=folder,
            num_samples=num_samples,
        )
        values = rule.build().solve(pool)
        publish_text(path, json.dumps({"inputs": digest, "values": values}, allow_nan=False) + "\n")
    for other in job.work.solutions(rule.label):
        if other != folder:
            shutil.rmtree(other)
    return Solved(rule, folder)


@dataclass(frozen=True)
class _Job:
    config: CurateConfig
    work: WorkFolder
    engine: Engine


def decide(config: CurateConfig, scanned: pa.Table, inputs: str, engine: Engine) -> pa.Table:
    """Decide for all samples of the scanned shards; return one row a shard (work.DECIDED)."""
    job = _Job(config, WorkFolder(config.work_dir), engine)
    rules = Rules.of(config)
    after = _EntryCounts(rules.balancer)
    shards = scanned.filter(scanned["quarantined"].is_null()).combine_chunks()
    shards = with_vectors(shards, rules.vectors, engine)
    pairs = zip(shards["index_digest"].to_pylist(), shards[VECTORS].to_pylist(), strict=True)
    digests = [f"{digest} {vectors}" if vectors else digest for digest, vectors in pairs]
    solved: Solved | None = None
    solutions: dict[str, Any] = {}
    for number, phase in enumerate(rules.phases):
        digests = [
            digest_of(digest, solved and solved.folder.name, phase.digest) for digest in digests
        ]
        outcome = _run_phase(job, shards, digests, (number, phase), solved, after)
        if phase.ends_with is None:
            break
        places = _Lazily(len(shards), partial(_place, job.work, shards, number))
        seen = _digest_of_pool(shards, digests)
        solved = _solve(phase.ends_with, places, seen, int(outcome.num_left.sum()), job)
        solutions[phase.ends_with.label] = solved.read().values
        after.take(solved)
    publish_text(job.work.solutions_file, json.dumps(solutions, indent=1, sort_keys=True) + "\n")
    after.publish(job.work.entry_counts)
    table = _summary(job.work, shards, digests, outcome)
    return job.work.publish_summary("decided", table, inputs)


def _digest_of_pool(shards: pa.Table, digests: Sequence[str]) -> str:
    """Return the digest of what a global rule sees: all shards by name, in any order."""
    order = pc.sort_indices(shards, [("source", "ascending"), ("shard", "ascending")])
    pool = hashlib.sha256()
    for i in order.to_pylist():
        pool.update(f"{_cell(shards, 'source', i)}\n{_cell(shards, 'shard', i)}\n".encode())
        pool.update(f"{digests[i]}\n".encode())
    return pool.hexdigest()


def _cell(shards: pa.Table, column: str, row: int) -> Any:
    return shards[column][row].as_py()


class _EntryCounts:
    """Counts of the balancer's entries before and after: of its pool, and of the kept samples."""

    def __init__(self, balancer: Rule | None) -> None:
        self._balancer = balancer
        self._before = self._after = np.zeros(0, np.int64)
        self._solution: Solution | None = None

    @property
    def column(self) -> str | None:
        """The column of entry ids in the decision tables; None without a balancer."""
        return f"{self._balancer.label}.{ENTRIES}" if self._balancer else None

    def take(self, solved: Solved) -> None:
        """Take the counts of the pool, where it is the balancer that was solved."""
        if solved.rule == self._balancer:
            self._solution = solved.read()
            self._before = read_counts(solved.folder)
            self._after = np.zeros(len(self._before), np.int64)

    def add(self, judged: Judged) -> None:
        """Add the counts of a shard's kept samples."""
        if judged.entries is not None:
            ids, counts = judged.entries
            self._after[ids] += counts

    def publish(self, path: Path) -> None:
        """Publish the table of all entries."""
        if self._balancer is not None:
            rule = self._balancer.build()
            columns = {
                "before": self._before,
                "after": self._after,
                "is_head": rule.head(self._before, self._solution),
            }
            table = rule.entry_table()
            for name, values in columns.items():
                table = table.append_column(name, pa.array(values))
            publish_table(path, table)


@dataclass(frozen=True)
class _Outcome:
    """What a phase left of all shards, in their order: a few bytes each."""

    num_samples: IntArray
    num_left: IntArray
    reasons: list[str]  # last phase: JSON, reason or problem -> samples that are out


def _run_phase(
    job: _Job,
    shards: pa.Table,
    digests: Sequence[str],
    numbered: tuple[int, Phase],
    solved: Solved | None,
    after: _EntryCounts,
) -> _Outcome:
    number, phase = numbered

    def make(i: int) -> JudgeTask:
        source, shard = _cell(shards, "source", i), _cell(shards, "shard", i)
        where = job.work.partial(number, source, shard)
        return JudgeTask(
            place=_place(job.work, shards, number - 1, i),
            result=where if phase.ends_with else job.work.decisions(source, shard),
            result_digest=digests[i],
            solved=solved,
            phase=phase,
            seed=job.config.seed,
            entries=None if phase.ends_with else after.column,
        )

    step = phase.ends_with.label if phase.ends_with else "decide"
    num_samples, num_left = np.zeros((2, len(shards)), np.int64)
    outcome = _Outcome(num_samples, num_left, [""] * len(shards))
    for i, judged in job.engine.map(judge_shard, _Lazily(len(shards), make), label=step):
        after.add(judged)
        outcome.num_samples[i], outcome.num_left[i] = judged.num_samples, judged.num_left
        if phase.ends_with is None:
            outcome.reasons[i] = json.dumps(judged.reasons)
    return outcome


def _place(work: WorkFolder, shards: pa.Table, phase: int, number: int) -> Place:
    source, shard = _cell(shards, "source", number), _cell(shards, "shard", number)
    return Place(
        number=number,
        source=source,
        shard=shard,
        index=Path(_cell(shards, "index", number)),
        index_digest=_cell(shards, "index_digest", number),
        partial=work.partial(phase, source, shard),
        vectors=_cell(shards, VECTORS, number),
    )


def _summary(
    work: WorkFolder, shards: pa.Table, digests: Sequence[str], outcome: _Outcome
) -> pa.Table:
    scanned = shards["num_samples"].to_numpy()
    for i in np.flatnonzero(outcome.num_samples != scanned)[:1]:
        raise DataError(
            f"{_cell(shards, 'index', int(i))}: {outcome.num_samples[i]} rows, {scanned[i]} when "
            "scanned. It changed since: run the scan again (`stages=[scan]`)."
        )
    names = zip(shards["source"].to_pylist(), shards["shard"].to_pylist(), strict=True)
    made = {
        "decisions": pa.array([str(work.decisions(*name)) for name in names], pa.string()),
        "inputs_digest": pa.array(digests, pa.string()),
        "num_kept": pa.array(outcome.num_left),
        "reasons": pa.array(outcome.reasons, pa.string()),
    }
    columns = [made[name] if name in made else shards[name] for name in DECIDED.names]
    return pa.table(columns, schema=DECIDED)
