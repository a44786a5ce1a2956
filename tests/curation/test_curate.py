from __future__ import annotations

import json
import os
import shutil
import signal
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml

from configs import draws
from configs.errors import DataError, UsageError
from configs.load import to_yaml
from curation.config import EngineConfig
from curation.engine import Engine
from curation.job import curate, index
from curation.manifest import read_index, read_manifest
from curation.scan import Scanned

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def decisions_of(config):
    folder = config.work_dir / "decisions"
    return {p.stem: pq.read_table(p).to_pylist() for p in sorted(folder.rglob("*.parquet"))}


def test_every_sample_is_kept_dropped_or_unreadable_and_the_report_says_so(finished):
    config, report = finished
    content = json.loads((Path(config.output) / "report.json").read_text())
    assert content == json.loads(json.dumps(report.content))
    rows = [row for rows in decisions_of(config).values() for row in rows]
    assert len(rows) == len({row["uid"] for row in rows}) == content["num_read"] == 240
    verdicts = Counter(row["verdict"] for row in rows)
    assert verdicts["kept"] == content["num_kept"] == report.manifest.num_samples
    assert verdicts["dropped"] == content["num_dropped"] == sum(content["dropped"].values())
    assert content["dropped"]["caption_length/too few words"] == 24
    assert content["dropped"]["image_size/side too short"] == 24
    assert content["num_kept"] + content["num_dropped"] + content["num_unreadable"] == 240
    assert [step["remaining"] for step in content["funnel"]] == [240, 216, 192, content["num_kept"]]
    for name, histogram in content["histograms"].items():
        assert sum(histogram["before"]) == 240, name
        assert sum(histogram["after"]) == content["num_kept"], name
    for reason, samples in content["samples"].items():
        assert len(samples) == min(24, {**content["dropped"], "kept": content["num_kept"]}[reason])
        for sample in samples:
            data = Path(sample["shard"]).read_bytes()[sample["image_offset"] :][
                : sample["image_size"]
            ]
            assert data.startswith(b"\x89PNG")
    # A pool smaller than the sample is in it whole; order and outcome come from the uid alone.
    found = Counter(outcome for _, outcome, _ in content["caption_sample"])
    assert found == {**content["dropped"], "kept": content["num_kept"]}
    assert sum(content["languages"]["before"].values()) == 240
    assert sum(content["languages"]["after"].values()) == content["num_kept"]
    assert "kept" in report.text()
    assert "240" in report.text()


def test_keep_probability_and_draw_follow_from_counts_and_uid(finished):
    config, _ = finished
    counts = pq.read_table(Path(config.output) / "entry_counts.parquet").to_pydict()
    before = np.array(counts["before"])
    rows = [row for rows in decisions_of(config).values() for row in rows]
    balanced = [row for row in rows if row["keep_probability"] is not None]
    assert len(balanced) == 192
    matched = Counter(e for row in balanced for e in row["metaclip.entries"])
    assert before.tolist() == [matched[i] for i in range(len(before))]
    after = Counter(e for r in balanced if r["verdict"] == "kept" for e in r["metaclip.entries"])
    assert counts["after"] == [after[i] for i in range(len(before))]
    uniform = draws.uniform(7, "metaclip/draw", *draws.uid_words([r["uid"] for r in balanced]))
    for row, draw in zip(balanced, uniform, strict=True):
        p = [10 / max(before[e], 10) for e in row["metaclip.entries"]]
        assert row["keep_probability"] == pytest.approx(1 - np.prod([1 - x for x in p]))
        assert row["draw"] == draw
        assert (row["verdict"] == "kept") == (row["draw"] < row["keep_probability"])


def test_output_shards_are_equal_and_hold_the_very_bytes_of_the_kept_samples(finished, pool):
    config, report = finished
    output = Path(config.output)
    manifest = read_manifest(output)
    assert manifest.digest == report.manifest.digest
    sizes = manifest.samples_per_shard.tolist()
    assert set(sizes[:-1]) == {25}
    assert 0 < sizes[-1] <= 25
    source = {}
    for path in sorted((pool / "train").glob("*.tar")):
        indexed = pq.read_table(Path(config.index_dir) / "pool" / f"{path.stem}.index.parquet")
        for row in indexed.to_pylist():
            source[row["uid"]] = (path.read_bytes(), row)
    kept = {
        r["uid"] for rows in decisions_of(config).values() for r in rows if r["verdict"] == "kept"
    }
    written = []
    for shard in manifest.shards:
        data = shard.path.read_bytes()
        for row in read_index(shard.path).to_pylist():
            written.append(row["uid"])
            original, old = source[row["uid"]]
            assert row["caption"] == old["caption"]
            spans = [
                (r["member_offset"], r["member_size"], bytes_)
                for r, bytes_ in ((row, data), (old, original))
            ]
            new_old = [[b[o : o + s] for o, s in zip(of, sz, strict=True)] for of, sz, b in spans]
            assert new_old[0] == new_old[1]
            image = data[row["image_offset"] :][: row["image_size"]]
            assert image == original[old["image_offset"] :][: old["image_size"]]
    assert sorted(written) == sorted(kept)
    assert set(os.listdir(output)) == {
        "manifest.json", "shards.parquet", "config.yaml", "report.json", "entry_counts.parquet",
        *(f"{n:05d}.{end}" for n in range(len(sizes)) for end in ("tar", "index.parquet")),
    }  # fmt: skip


def test_two_kept_samples_never_share_a_key_and_decisions_keep_the_original(finished):
    config, _ = finished
    manifest = read_manifest(config.output)
    original = {r["uid"]: r["key"] for rows in decisions_of(config).values() for r in rows}
    seen = set()
    for shard in manifest.shards:
        with tarfile.open(shard.path) as tar:
            names = [member.name for member in tar.getmembers()]
        rows = read_index(shard.path).to_pylist()
        assert names == [f"{r['key']}.{ext}" for r in rows for ext in r["member_ext"]]
        for row in rows:
            key = original[row["uid"]]
            expected = f"{key}-{row['uid'].hex()[:8]}" if key in seen else key
            assert row["key"] == expected
            seen.add(key)
    assert len(seen) < manifest.num_samples


def test_webdataset_reads_every_sample_of_the_output(finished):
    config, report = finished
    paths = [str(shard.path) for shard in read_manifest(config.output).shards]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    assert len(samples) == report.manifest.num_samples
    assert all({"png", "txt", "json"} <= sample.keys() for sample in samples)
    assert len({sample["__key__"] for sample in samples}) == len(samples)


def test_output_is_byte_identical_for_any_workers_and_any_order_of_shards(
    finished, job, pool, tars
):
    expected = tars.hashes(Path(finished[0].output))
    files = [str(path) for path in sorted((pool / "train").glob("*.tar"))]
    listed = []
    for number, changes in enumerate(
        (
            {"engine": {"num_workers": 1}},
            {"engine": {"num_workers": 2}, "sources": [{"name": "pool", "shards": files}]},
            {"engine": {"num_workers": 2}, "sources": [{"name": "pool", "shards": files[::-1]}]},
        )
    ):
        config = job(**changes)
        curate(config)
        got = tars.hashes(Path(config.output))
        if number == 0:
            assert got == expected
            reference = {k: v for k, v in got.items() if k.endswith((".tar", ".index.parquet"))}
        else:  # the recipe names the files another way; the data are the same
            assert {k: v for k, v in got.items() if k in reference} == reference
            listed.append(got)
        shutil.rmtree(config.output)
        shutil.rmtree(config.work_dir)
    assert listed[0] == listed[1]


def test_stages_run_alone_in_order_and_say_which_one_is_missing(finished, job, tars):
    with pytest.raises(UsageError, match="'scan' has not run"):
        curate(job(stages=["decide"]))
    assert "240" in curate(job(stages=["scan"])).text()
    with pytest.raises(UsageError, match="'decide' has not run"):
        curate(job(stages=["write"]))
    curate(job(stages=["decide"]))
    with pytest.raises(UsageError, match="'write' has not run"):
        curate(job(stages=["report"]))
    with pytest.raises(UsageError, match="'decide' ran with another configuration"):
        curate(job(stages=["write"], seed=8))
    curate(job(stages=["write"]))
    curate(job(stages=["report"]))
    assert tars.hashes(Path(job().output)) == tars.hashes(Path(finished[0].output))


def test_a_rerun_makes_only_what_is_missing(finished, job, tars):
    config = job()
    curate(config)
    output = Path(config.output)
    before = {p: p.stat().st_mtime_ns for p in (*output.glob("0*"), output / "manifest.json")}
    partial = {p: p.stat().st_mtime_ns for p in config.work_dir.rglob("partial/**/*.parquet")}
    assert partial
    (output / "00001.tar").unlink()
    (output / "00002.index.parquet").unlink()
    (output / "report.json").unlink()
    (output / ".00003.tar.tmp-1-dead").touch()
    curate(config)
    changed = {p.name for p, at in before.items() if p.stat().st_mtime_ns != at}
    assert {"00001.tar", "00001.index.parquet", "00002.tar", "00002.index.parquet"} == changed
    assert tars.hashes(output) == tars.hashes(Path(finished[0].output))
    shutil.rmtree(output)
    curate(job(rules=[*to_tree(config)["rules"][:2], {**to_tree(config)["rules"][2], "t": 20}]))
    assert {p: p.stat().st_mtime_ns for p in partial} == partial  # another t: nothing matched again


def to_tree(config):
    return yaml.safe_load(to_yaml(config))


def test_a_finished_dataset_is_not_overwritten_by_another_job(job):
    curate(job())
    with pytest.raises(UsageError, match="made with another configuration"):
        curate(job(seed=8))
    Path(job().output, "manifest.json").unlink()
    with pytest.raises(UsageError, match="not empty"):
        curate(job(seed=8))
    # An unfinished run of ours: the other job may go on from here.
    Path(job().output, ".pairmill-unfinished").touch()
    assert curate(job(seed=8, write={"samples_per_shard": 100})).manifest.num_shards < 3
    assert len(list(Path(job().output).glob("*.tar"))) < 3


def test_damaged_input_is_counted_and_nothing_is_lost(job, tars, tmp_path):
    folder = tmp_path / "in"
    good = tars.sample("good", "a red cat thing")
    tars.write(folder / "0.tar", [*good, *tars.sample("cut", "a red dog thing")])
    with tarfile.open(folder / "0.tar") as tar:
        cut = tar.getmember("cut.png").offset_data + 10
    (folder / "0.tar").write_bytes((folder / "0.tar").read_bytes()[:cut])
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tars.write(
        folder / "1.tar",
        [
            *good,
            ("alone.png", tars.png()),
            ("text.txt", b"only text"),
            ("json.png", tars.png()), ("json.json", b"{nope"),
            ("bytes.png", tars.png()), ("bytes.txt", b"\xff\xfe"),
            ("empty.png", b""), ("empty.txt", b"a cat"),
            ("../up.png", tars.png()), link,
        ],
    )  # fmt: skip
    (folder / "2.tar").write_bytes(b"no tar at all, but long enough to have a header" * 40)
    (folder / "3.tar").write_bytes(b"")
    source = {"name": "in", "shards": str(folder)}
    report = curate(
        job(sources=[source], rules=[{"name": "caption_length", "min_words": 2}])
    ).content
    assert (report["num_read"], report["num_kept"], report["num_unreadable"]) == (8, 2, 6)
    assert report["unreadable"] == {
        "bad json": 1,
        "caption not utf-8": 1,
        "empty image": 1,
        "no caption": 1,
        "no image": 1,
        "truncated": 1,
    }
    shards = report["shards"]
    assert (shards["num_damaged"], shards["num_quarantined"], shards["ignored_members"]) == (
        2,
        1,
        2,
    )
    assert shards["quarantined"][0]["shard"].endswith("2.tar")
    (folder / "0.tar").unlink()
    (folder / "1.tar").unlink()
    (folder / "3.tar").unlink()
    with pytest.raises(DataError, match="none of the 1 shards can be read"):
        curate(job(sources=[source], output=str(tmp_path / "other")))


def test_rules_that_drop_everything_are_an_error_that_says_so(job):
    with pytest.raises(DataError, match="none of the 240 samples"):
        curate(job(rules=[{"name": "caption_length", "min_words": 99}]))


def test_img2dataset_shards_are_curated_by_config_alone(job, tars, tmp_path):
    path = tars.shared / "data" / "captions" / "cc12m-32-img2dataset.tar"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    rules = [{"name": "image_size", "min_side": 256}]
    config = job(sources=[{"name": "cc12m", "shards": str(path)}], rules=rules)
    report = curate(config)
    assert report.content["num_read"] == 32
    shards = [str(shard.path) for shard in report.manifest.shards]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert len(samples) == report.content["num_kept"] > 0
    # A curated dataset can be an input: its samples stay who they are.
    again = job(
        sources=[{"name": "again", "shards": config.output}],
        rules=[],
        index_dir=None,
        output=str(tmp_path / "again"),
    )
    uids = [
        {row["uid"] for s in curated.manifest.shards for row in read_index(s.path).to_pylist()}
        for curated in (report, curate(again))
    ]
    assert uids[0] == uids[1]


def test_index_makes_foreign_tars_a_dataset(pool, tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(pool / "train", folder)
    assert "240 samples in 6 shards" in index([str(folder)])
    assert read_manifest(folder).num_samples == 240


def test_a_curated_dataset_is_not_indexed_over(finished, tars):
    folder = Path(finished[0].output)
    before = tars.hashes(folder)
    for pattern in (folder, folder / "00000.tar"):
        with pytest.raises(UsageError, match="is a curated dataset"):
            index([str(pattern)])
    assert tars.hashes(folder) == before


def _fail(task: str) -> Scanned:
    if task == "disk":
        raise OSError(28, "No space left on device", "/data/x")
    if task == "user":
        raise UsageError("what the user can mend")
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        ("disk", DataError, "disk: No space left on device"),
        ("user", UsageError, "what the user can mend"),
        ("bug", ZeroDivisionError, "a bug"),
    ],
)
def test_an_error_in_a_task_comes_back_as_itself(task, error, message):
    with Engine(EngineConfig()) as engine, pytest.raises(error, match=message):
        list(engine.map(_fail, [task], label="test"))


def _die_once(task: str) -> Scanned:
    from curation.index import IndexInfo

    if not Path(task).exists():
        Path(task).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Scanned(info=IndexInfo(source="s", shard="x", num_bytes=0, num_samples=1))


def test_a_task_whose_worker_is_killed_is_run_again(tmp_path):
    with Engine() as engine:
        ((position, result),) = engine.map(_die_once, [str(tmp_path / "mark")], label="test")
    assert (position, result.num_samples) == (0, 1)
