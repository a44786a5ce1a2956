"""De-duplication as a rule of a job: over any shards, killed at any task, the same verdicts."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.load import validate
from curation.config import CurateConfig
from curation.filters.base import needs_of
from curation.global_rules import ShardPart, Solution, global_rules
from curation.global_rules.base import Place
from curation.index import read_index_file
from curation.scan import InputShard, ScanTask, scan_shard


def clones(tars, folder):
    """Four shards: pairs of equal images across shards, a caption of nine samples, singles."""
    for shard in range(4):
        members = []
        for i in range(12):
            n = shard * 12 + i
            caption = "Lemon theme" if i < 2 + shard % 2 else f"caption number {n} of the pool"
            shade = n % 24 + (100 if i > 8 else 0)
            members += tars.sample(f"{n:03d}", caption, side=20 + n % 24 % 5, shade=shade)
        tars.write(folder / f"{shard}.tar", members)


RULES = [
    {"name": "caption_count", "max_count": 5},
    {"name": "dedup", "by": ["image", "text"], "min_jaccard": 0.95},
]


@pytest.mark.ray
def test_a_job_drops_frequent_captions_and_duplicates_alike_over_any_shards(
    tars, tmp_path, ray_session
):
    from curation.dedup import exchange, rule
    from curation.job import curate

    clones(tars, tmp_path / "in")

    def run(name, shards, **changes):
        tree = {
            "name": name,
            "output": str(tmp_path / name),
            "sources": [{"name": "s", "shards": shards}],
            "rules": RULES,
            **changes,
        }
        return curate(validate(tree, CurateConfig, label="t"))

    report = run("one", str(tmp_path / "in"))
    assert report.counts["dropped"]["caption_count/too frequent"] == 10
    tables = [
        pq.read_table(path)
        for path in sorted((tmp_path / "one.work" / "decisions" / "s").glob("*.parquet"))
    ]
    decisions = pa.concat_tables(tables)
    shard_of = {uid: number for number, t in enumerate(tables) for uid in t["uid"].to_pylist()}
    rows = decisions.to_pylist()
    dropped = [row for row in rows if row["dedup.duplicate_of"] is not None]
    verdict_of = {row["uid"]: row for row in rows}
    assert dropped
    for row in dropped:
        assert row["reason"] in ("dedup/same image", "dedup/similar caption")
        assert shard_of[row["dedup.duplicate_of"]] == row["dedup.duplicate_shard"]
        assert verdict_of[row["dedup.duplicate_of"]]["caption_count.count"] <= 5
    # Made again from nothing: the same bytes, from shards named in another order and with files
    # so small that they are merged.
    saved = exchange.MAX_FILES, rule.RECORDS_PER_PARTITION
    exchange.MAX_FILES, rule.RECORDS_PER_PARTITION = 2, 7
    try:
        shards = [str(tmp_path / "in" / f"{i}.tar") for i in (2, 0, 3, 1)]
        run("two", shards)
    finally:
        exchange.MAX_FILES, rule.RECORDS_PER_PARTITION = saved
    one, two = (
        {name: digest for name, digest in tars.hashes(tmp_path / job).items() if ".tar" in name}
        for job in ("one", "two")
    )
    assert one == two
    for path in sorted((tmp_path / "one.work" / "decisions" / "s").iterdir()):
        again = pq.read_table(tmp_path / "two.work" / "decisions" / "s" / path.name)
        assert again.equals(pq.read_table(path))


class KilledError(Exception):
    pass


class LocalPool:
    """A pool of scanned shards in this process; its driver is killed before task `stop`."""

    def __init__(self, places, folder, stop=10**9):
        self.label, self.seed, self.folder, self.stop, self.done = "dedup", 0, folder, stop, 0
        self.places, self.num_shards = places, len(places)
        self.num_samples = sum(part.num_samples for part in self.parts())
        folder.mkdir(exist_ok=True)

    def parts(self):
        for place in self.places:
            uids = read_index_file(place.index, ["uid"])["uid"]
            partial = pa.table({"uid": uids, "verdict": ["kept"] * len(uids)})
            yield ShardPart(place, label=self.label, seed=0, table=partial)

    def _count(self):
        self.done += 1
        if self.done > self.stop:
            raise KilledError

    def map(self, function, argument, *, step):
        for part in self.parts():
            self._count()
            yield part.number, function(part, argument)

    def run(self, function, tasks, *, step, unit):
        for position, task in enumerate(tasks):
            self._count()
            yield position, function(task)


@pytest.mark.parametrize("name", ["dedup", "caption_count"])
def test_a_rule_killed_before_any_of_its_tasks_goes_on_to_the_same(
    name, tars, tmp_path, monkeypatch
):
    monkeypatch.setattr("curation.dedup.exchange.MAX_FILES", 2)
    keywords = {"by": ("image", "text", "phash"), "min_jaccard": 0.95}
    rule = global_rules[name](**keywords if name == "dedup" else {"max_count": 5})
    clones(tars, tmp_path / "in")
    places = []
    for number in range(4):
        path = tmp_path / "in" / f"{number}.tar"
        index = tmp_path / f"{number}.parquet"
        shard = InputShard(source="s", shard=path.name, path=path, index=index)
        scanned = scan_shard(ScanTask(input=shard, columns=needs_of([rule]).columns))
        digest = scanned.index_digest
        place = {"number": number, "source": "s", "shard": path.name, "index": index}
        places.append(Place(**place, index_digest=digest, partial=tmp_path / "none"))

    def judge(pool):
        solution = Solution(rule.solve(pool), pool.folder)
        found = [rule.apply(part, solution) for part in pool.parts()]
        return [
            ({n: v.to_pylist() for n, v in values.items()}, reasons.to_pylist())
            for values, reasons in found
        ]

    pool = LocalPool(places, tmp_path / "whole")
    whole = judge(pool)
    assert any(reason for _, reasons in whole for reason in reasons)
    assert pool.done >= 8
    for stop in range(0, pool.done, 1 + pool.done // 8):
        folder = tmp_path / f"killed{stop}"
        with pytest.raises(KilledError):
            judge(LocalPool(places, folder, stop))
        assert judge(LocalPool(places, folder)) == whole
