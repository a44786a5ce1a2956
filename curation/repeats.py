"""What repeats in a pool, for the report: groups of duplicates, and frequent captions.

Both come from the values of the rules `dedup` and `caption_count` in the decisions. A shard hands
over what can be among the first of the whole pool, so that merging them in any order is exact.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from configs import draws
from curation.dedup.caption_count import COUNT
from curation.dedup.rule import DUPLICATE_OF, DUPLICATE_SHARD
from curation.dedup.text import normalize_caption
from curation.index import read_index_file
from curation.work import read_decisions

if TYPE_CHECKING:  # a worker needs neither, and they take long to import
    from curation.config import CurateConfig
    from curation.engine import Engine

NUM_GROUPS = 24
NUM_MEMBERS = 8
NUM_CAPTIONS = 100
MAX_CAPTION_CHARACTERS = 1000
KEPT = "kept"
REFERENCE_COLUMNS = (
    "uid", "key", "caption", "image_ext", "image_offset", "image_size", "width", "height",
)  # fmt: skip


def reference(shard: str, index: pa.Table, row: int) -> dict[str, Any]:
    """Return where a sample's picture lies, with its caption and size."""
    content = index.slice(row, 1).to_pylist()[0]
    caption = content["caption"]
    return {
        "shard": shard,
        "uid": content["uid"].hex(),
        "key": content["key"],
        "caption": caption if caption is None else caption[:MAX_CAPTION_CHARACTERS],
        **{name: content[name] for name in ("image_ext", "image_offset", "image_size")},
        **{name: content[name] for name in ("width", "height")},
    }


@dataclass(frozen=True)
class RepeatRules:
    """Labels of the rules whose values are looked at."""

    dedup: tuple[str, ...]  # and semdedup: those that say for whom a sample goes
    caption_count: tuple[str, ...]

    @classmethod
    def of(cls, config: CurateConfig) -> RepeatRules:
        """Return those of a job."""
        named = list(zip(config.rule_labels(), config.rules, strict=True))
        return cls(
            dedup=tuple(label for label, rule in named if rule.name in ("dedup", "semdedup")),
            caption_count=tuple(label for label, rule in named if rule.name == "caption_count"),
        )

    @property
    def columns(self) -> list[str]:
        """Columns of the decision tables that are needed."""
        groups = [f"{x}.{name}" for x in self.dedup for name in (DUPLICATE_OF, DUPLICATE_SHARD)]
        return [*groups, *(f"{label}.{COUNT}" for label in self.caption_count)]


@dataclass
class Group:
    """Samples that go for one other; `rank` is a hash of its uid."""

    rank: int
    uid: bytes  # of the one that they go for
    shard: int  # where that lies: row of the table of shards
    num_dropped: int = 0
    members: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # (uid, reference)

    def merge(self, other: Group) -> None:
        """Take in what another shard has of this group."""
        self.num_dropped += other.num_dropped
        both = self.members + other.members
        self.members = heapq.nsmallest(NUM_MEMBERS, both, key=lambda member: member[0])


@dataclass
class Caption:
    """A caption that several samples have; `outcomes`: "kept" or reason -> samples."""

    count: int
    text: str  # as the first of them writes it
    outcomes: Counter[str]

    def merge(self, other: Caption) -> None:
        """Take in what another shard has of this caption."""
        self.text = min(self.text, other.text)
        self.outcomes.update(other.outcomes)


class Repeats:
    """Groups by (label, uid) and captions by (label, normalised caption), the first of each."""

    def __init__(self) -> None:
        self.groups: dict[tuple[str, bytes], Group] = {}
        self.captions: dict[tuple[str, str], Caption] = {}

    def merge(self, other: Repeats) -> None:
        """Take in what another shard hands over."""
        _merge(self.groups, other.groups)
        _merge(self.captions, other.captions)
        self.cut()

    def cut(self) -> None:
        """Leave the groups first by hash, and the most frequent captions, of each label."""
        self.groups = _first(self.groups, NUM_GROUPS, lambda key, g: (g.rank, key))
        self.captions = _first(self.captions, NUM_CAPTIONS, lambda key, c: (-c.count, key))


def _merge(mine: dict[Any, Any], theirs: Mapping[Any, Any]) -> None:
    for key, value in theirs.items():
        if key in mine:
            mine[key].merge(value)
        else:
            mine[key] = value


def _first(found: dict[Any, Any], num: int, order: Any) -> dict[Any, Any]:
    labels = {label for label, _ in found}
    return {
        key: found[key]
        for label in sorted(labels)
        for key in heapq.nsmallest(
            num, (k for k in found if k[0] == label), key=lambda k: order(k, found[k])
        )
    }


def shard_repeats(
    shard: str, index: pa.Table, decisions: pa.Table, rules: RepeatRules, seed: int
) -> Repeats:
    """Return what one shard hands over; `index` has REFERENCE_COLUMNS, row by row as decisions."""
    found = Repeats()
    for label in rules.dedup:
        _find_groups(found, label, shard, index, decisions, seed)
    outcomes = decisions["reason"].to_pylist()
    captions = index["caption"].to_pylist() if rules.caption_count else []
    for label in rules.caption_count:
        for row, count in enumerate(decisions[f"{label}.{COUNT}"].to_pylist()):
            if count is not None and count > 1:
                text = captions[row]
                shown = text[:MAX_CAPTION_CHARACTERS]
                caption = Caption(count, shown, Counter([outcomes[row] or KEPT]))
                _merge(found.captions, {(label, normalize_caption(text)): caption})
    found.cut()
    return found


def _find_groups(
    found: Repeats, label: str, shard: str, index: pa.Table, decisions: pa.Table, seed: int
) -> None:
    winners = decisions[f"{label}.{DUPLICATE_OF}"].to_pylist()
    rows = [row for row, uid in enumerate(winners) if uid is not None]
    if not rows:
        return
    uids = decisions["uid"].to_pylist()
    shards = decisions[f"{label}.{DUPLICATE_SHARD}"].to_pylist()
    words = draws.uid_words([winners[row] for row in rows])
    ranks = draws.bits(seed, "report/group", *words).tolist()
    first = set(heapq.nsmallest(NUM_GROUPS, set(ranks)))
    for rank, row in zip(ranks, rows, strict=True):
        if rank in first:
            member = (uids[row].hex(), reference(shard, index, row))
            group = Group(rank, winners[row], shards[row], 1, [member])
            _merge(found.groups, {(label, winners[row]): group})


@dataclass(frozen=True)
class _FindTask:
    """Find some samples of one shard by uid."""

    shard: str
    index: Path
    index_digest: str
    decisions: Path
    inputs_digest: str
    uids: tuple[bytes, ...]

    def __str__(self) -> str:
        return self.shard


@dataclass(frozen=True)
class _Found:
    num_samples: int
    samples: dict[bytes, dict[str, Any]]


def _find(task: _FindTask) -> _Found:
    index = read_index_file(task.index, list(REFERENCE_COLUMNS), digest=task.index_digest)
    reasons = read_decisions(task.decisions, ["reason"], task.inputs_digest)["reason"].to_pylist()
    rows = {uid: row for row, uid in enumerate(index["uid"].to_pylist())}
    samples = {
        uid: {**reference(task.shard, index, rows[uid]), "outcome": reasons[rows[uid]] or KEPT}
        for uid in task.uids
    }
    return _Found(len(samples), samples)


def summarize(
    repeats: Repeats,
    rules: RepeatRules,
    shards: Sequence[Mapping[str, Any]],
    dropped: Mapping[str, int],
    engine: Engine,
) -> dict[str, Any]:
    """Return `duplicates` and `captions` of the report (docs/formats.md)."""
    best = _find_best(repeats.groups.values(), shards, engine)
    duplicates = {}
    for label in rules.dedup:
        groups = [group for (of, _), group in repeats.groups.items() if of == label]
        duplicates[label] = {
            "num_dropped": sum(
                n for reason, n in dropped.items() if reason.startswith(f"{label}/")
            ),
            "groups": [
                {
                    "best": best[group.uid],
                    "num_dropped": group.num_dropped,
                    "dropped": [sample for _, sample in group.members],
                }
                for group in groups
            ],
        }
    captions = {
        label: [
            {"caption": c.text, "count": c.count, "outcomes": dict(sorted(c.outcomes.items()))}
            for (of, _), c in repeats.captions.items()
            if of == label
        ]
        for label in rules.caption_count
    }
    return {"duplicates": duplicates, "captions": captions}


def _find_best(
    groups: Iterable[Group], shards: Sequence[Mapping[str, Any]], engine: Engine
) -> dict[bytes, dict[str, Any]]:
    wanted: dict[int, set[bytes]] = {}
    for group in groups:
        wanted.setdefault(group.shard, set()).add(group.uid)
    tasks = [
        _FindTask(
            shard=shards[number]["path"],
            index=Path(shards[number]["index"]),
            index_digest=shards[number]["index_digest"],
            decisions=Path(shards[number]["decisions"]),
            inputs_digest=shards[number]["inputs_digest"],
            uids=tuple(sorted(uids)),
        )
        for number, uids in sorted(wanted.items())
    ]
    best: dict[bytes, dict[str, Any]] = {}
    for _, found in engine.map(_find, tasks, label="report: duplicates") if tasks else ():
        best.update(found.samples)
    return best
