"""Pools of shards with vectors, and rules run over them in this process, for tests of selectors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from curation.global_rules import global_rules
from curation.global_rules.base import Place, ShardPart, Solution
from curation.index import SCHEMA, IndexInfo, read_index_file, write_index
from curation.vectors import FindVectors, find_vectors, write_vectors
from curation.verdicts import Verdicts


def uid_of(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def write_shard(path: Path, numbers, vectors, **columns) -> Path:
    """Write the index of samples `numbers` and their rows of `vectors`: name -> [all, dim]."""
    rows = [
        {
            "uid": uid_of(n),
            "key": f"{n:05d}",
            "caption": f"caption {n}",
            "width": 10 + n % 7,
            "height": 10,
            "image_ext": "jpg",
            "image_offset": 0,
            "image_size": 1,
            **{name: [] for name in SCHEMA.names if name.startswith("member_")},
        }
        for n in numbers
    ]
    table = pa.Table.from_pylist(rows, SCHEMA)
    for name, values in columns.items():
        table = table.append_column(name, pa.array([values[n] for n in numbers]))
    write_index(
        path, table, IndexInfo(source="s", shard=path.name, num_bytes=0, num_samples=len(rows))
    )
    for name, array in vectors.items():
        write_vectors(path, name, array[list(numbers)].astype(np.float16))
    return path


class KilledError(Exception):
    """The driver dies."""


class LocalPool:
    """The pool of a global rule over parts in this process, in an order that is given.

    Its driver is killed before task `stop`.
    """

    def __init__(self, parts, label, seed, folder, order, stop=10**9):
        self.label, self.seed, self.folder, self._left = label, seed, folder, stop
        self.num_shards, self.num_samples = len(parts), sum(p.num_samples for p in parts)
        self._parts, self._order = parts, order

    def _count(self):
        self._left -= 1
        if self._left < 0:
            raise KilledError

    def map(self, function, argument, *, step):
        for number in self._order:
            self._count()
            yield number, function(self._parts[number], argument)

    def run(self, function, tasks, *, step, unit):
        for position in reversed(range(len(tasks))):
            self._count()
            yield position, function(tasks[position])


def decide(paths, rules, folder: Path, *, seed=0, order=None, stop=None):
    """Run (label, rule) over shards; return (uid -> row of the decisions, label -> solution).

    With `stop` the driver of each rule is killed before its task 0, `stop`, 2 `stop` ... and goes
    on in the same folder with what it left.
    """
    labels = [label for label, _ in rules]
    names = tuple(sorted({n for _, rule in rules for n in getattr(rule, "vectors", ())}))
    order = order or list(range(len(paths)))
    verdicts = [Verdicts(read_index_file(path)) for path in paths]
    vectors = [find_vectors(FindVectors(path, names)).text for path in paths]
    solutions = {}
    for label, rule in rules:
        parts = []
        for number, path in enumerate(paths):
            verdicts[number].add(label, rule.emit(verdicts[number].left()))
            place = Place(
                number=number,
                source="s",
                shard=path.name,
                index=path,
                index_digest="",
                partial=Path("nowhere"),
                vectors=vectors[number],
            )
            object.__setattr__(place, "index_digest", _content(path))
            parts.append(ShardPart(place, label=label, seed=seed, table=verdicts[number].table()))
        solved = folder / label
        solved.mkdir(parents=True)
        values, at = None, 0 if stop else 10**9
        while values is None:
            try:
                values = rule.solve(LocalPool(parts, label, seed, solved, order, at))
            except KilledError:
                at += stop
        solutions[label] = json.loads(json.dumps(values, allow_nan=False))
        for part, verdict in zip(parts, verdicts, strict=True):
            verdict.judge(label, rule.apply(part, Solution(solutions[label], solved)))
            verdict.drop_scratch(label)
    rows = [row for v in verdicts for row in v.table().to_pylist()]
    assert labels == list(solutions)
    return {row["uid"]: row for row in rows}, solutions


def _content(path: Path) -> str:
    from curation.index import digest_of_index, read_index_info

    return digest_of_index(read_index_info(path))


def build(name: str, **keywords):
    """Return a rule as the configuration builds it."""
    return global_rules.section(name).model_validate({"name": name, **keywords}).build()
