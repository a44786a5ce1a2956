"""Jobs with several global rules on a real Ray: phases, reruns, prediction, report, sources."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.job import curate, dry_run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def many_rules(pool):
    """Two sources and five rules, three of them global; and the mix of the sources."""
    train = pool / "train"
    return {
        "sources": [
            {"name": "a", "shards": str(train / "0000[0-3].tar"), "weight": 1},
            {"name": "b", "shards": str(train / "0000[45].tar"), "weight": 1, "cap": 30},
        ],
        "rules": [
            {"name": "caption_length", "min_words": 2},
            {"name": "wfpp", "fraction": 0.9, "t": 1e-3},
            {"name": "image_size", "min_side": 16},
            {"name": "top_fraction", "column": "caption_length.characters", "fraction": 0.9},
            {"name": "metaclip", "metadata": str(pool / "metadata.txt"), "target_size": 100},
        ],
    }


@pytest.fixture(scope="module")
def ruled(configure, many_rules, tmp_path_factory, ray_session):
    """A job with them: (configuration, report, what a dry run said before the decisions)."""
    config = configure(tmp_path_factory.mktemp("ruled"), **many_rules)
    curate(config.model_copy(update={"stages": ("scan",)}))
    before = {p.name for p in config.work_dir.rglob("*")}
    said = dry_run(config)
    assert {p.name for p in config.work_dir.rglob("*")} == before
    assert not config.output_dir.exists()
    return config, curate(config), said


def decisions(config):
    paths = sorted(config.work_dir.glob("decisions/**/*.parquet"))
    return [row for path in paths for row in pq.read_table(path, partitioning=None).to_pylist()]


def test_each_rule_sees_only_what_the_rules_before_it_left(ruled):
    config, report, _ = ruled
    rows = decisions(config)
    funnel = {step["rule"]: step["remaining"] for step in report.content["funnel"]}
    assert funnel["wfpp"] == int(funnel["caption_length"] * 0.9)
    assert funnel["top_fraction"] == int(funnel["image_size"] * 0.9)
    assert funnel["metaclip"] == 100
    assert funnel["sources"] == report.content["num_kept"] == 60
    order = ["caption_length.words", "wfpp.score", "image_size.min_side", "top_fraction.score",
             "metaclip.entries", "draw"]  # fmt: skip
    for row in rows:
        has = [row[name] is not None for name in order]
        assert has == sorted(has, reverse=True)  # null after the first failure
        assert not any(name.startswith("wfpp._") for name in row)
    assert sum(row["wfpp.score"] is not None for row in rows) == funnel["caption_length"]
    assert sum(row["draw"] is not None for row in rows) == funnel["top_fraction"]
    assert len({row["uid"] for row in rows}) == len(rows) == 240


def test_a_dry_run_predicts_what_the_job_then_keeps_and_writes_nothing(ruled):
    _, report, said = ruled
    assert "prediction: 60 of 240 samples kept (25.0%)" in said
    for reason, count in report.content["dropped"].items():
        assert f"{count:>15,}  {reason}" in said
    t = report.content["solutions"]["metaclip"]["t"]
    assert f"metaclip: t = {t:,.6g} for the target size" in said
    entries = report.content["entries"]
    assert f"{entries['before']['head_share']:.1%} of the matches before" in said
    predicted = float(said.split(" MB in 3 shards")[0].rpartition(" ")[2])
    assert predicted == pytest.approx(report.manifest.num_bytes / 1e6, abs=0.15)


def test_the_report_has_columns_by_source_and_head_and_tail(ruled):
    config, _, _ = ruled
    content = json.loads((config.output_dir / "report.json").read_text())
    sources = content["sources"]
    assert [sources[s]["num_read"] for s in "ab"] == [160, 80]
    assert [sources[s]["num_kept"] for s in "ab"] == [30, 30]
    assert (sources["b"]["weight"], sources["b"]["cap"]) == (1, 30)
    for source in sources.values():
        total = source["num_kept"] + source["num_unreadable"] + sum(source["dropped"].values())
        assert total == source["num_read"]
    entries = content["entries"]
    table = pq.read_table(config.output_dir / "entry_counts.parquet").to_pydict()
    head = [n for n, is_head in zip(table["before"], table["is_head"], strict=True) if is_head]
    t = content["solutions"]["metaclip"]["t"]
    assert sorted(head) == sorted(n for n in table["before"] if n > t)
    before = entries["before"]
    assert before["head_share"] == pytest.approx(sum(head) / sum(table["before"]))
    assert before["head_share"] + before["tail_share"] == pytest.approx(1)
    assert entries["after"]["gini"] < before["gini"]
    assert sum(row["entries_before"] for row in entries["histogram"]) == before["num_matched"]


def test_many_rules_give_the_same_bytes_for_any_workers_order_and_rerun(
    ruled, job, many_rules, pool, tars
):
    expected = tars.hashes(ruled[0].output_dir)
    config = job(**many_rules, engine={"num_workers": 1})
    curate(config)
    assert tars.hashes(config.output_dir) == expected
    # As after a kill: some partial results, one solution and the decisions are gone.
    folders = sorted(config.work_dir.glob("partial/*"))
    assert [folder.name for folder in folders] == ["0", "1", "2", "3"]
    kept = {p: p.stat().st_mtime_ns for p in folders[0].rglob("*.parquet")}
    shutil.rmtree(folders[2])
    shutil.rmtree(next(config.work_dir.glob("solved/top_fraction-*")))
    shutil.rmtree(config.work_dir / "decisions")
    shutil.rmtree(config.output_dir)
    curate(config)
    assert tars.hashes(config.output_dir) == expected
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_another_size_solves_again_and_matches_nothing_again(
    ruled, tmp_path, many_rules, configure
):
    first = configure(tmp_path, **many_rules)
    curate(first.model_copy(update={"stages": ("scan", "decide")}))
    kept = {p: p.stat().st_mtime_ns for p in first.work_dir.rglob("partial/**/*.parquet")}
    rules = [*many_rules["rules"][:-1], {**many_rules["rules"][-1], "target_size": 70}]
    again = configure(tmp_path, **{**many_rules, "rules": rules}, stages=["scan", "decide"])
    counts = curate(again).counts
    assert counts["dropped"]["metaclip/balanced away"] > 0
    solutions = json.loads((again.work_dir / "solutions.json").read_text())
    assert solutions["metaclip"]["num_kept"] == 70
    changed = {p.parts[-3] for p, at in kept.items() if p.stat().st_mtime_ns != at}
    assert changed == {"3"}  # behind the balancer; nothing before it
    assert len(list(again.work_dir.glob("solved/metaclip-*"))) == 1


def test_a_worldwide_job_labels_languages_and_balances_each_over_its_list(job, tars, tmp_path):
    captions = ["The old house stands near the river", "Das alte Haus steht am Fluss"]
    members = []
    for n in range(20):
        members += tars.sample(f"{n:03d}", captions[n % 2], shade=n)
    tars.write(tmp_path / "in" / "0.tar", members)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "en.txt").write_text("house\nriver\n")
    (tmp_path / "lists" / "de.txt").write_text("Haus\nhouse\n")
    metaclip2 = {"name": "metaclip2", "metadata": str(tmp_path / "lists"), "t": 100}
    config = job(
        sources=[{"name": "w", "shards": str(tmp_path / "in")}],
        rules=[{"name": "language"}, metaclip2],
    )
    report = curate(config)
    rows = decisions(config)
    assert {row["metaclip2.metadata"] for row in rows} == {"de", "en"}
    table = pq.read_table(config.output_dir / "entry_counts.parquet").to_pylist()
    counts = {(row["language"], row["entry"]): row["before"] for row in table}
    assert counts == {("de", "Haus"): 10, ("de", "house"): 0, ("en", "house"): 10,
                      ("en", "river"): 10}  # fmt: skip
    assert report.content["num_kept"] == 20


def test_a_prediction_from_some_of_the_shards_says_so_and_scales(
    job, pool, many_rules, monkeypatch
):
    import curation.predict as module

    rules = [many_rules["rules"][0], {**many_rules["rules"][-1], "target_size": 120}]
    config = job(rules=rules)
    assert "no prediction: none of the shards has an index" in dry_run(config)
    curate(config.model_copy(update={"stages": ("scan",)}))
    monkeypatch.setattr(module, "MAX_SAMPLES", 120)
    said = dry_run(config)
    assert "the prediction comes from 3 of 6 shards" in said
    kept = int(said.split("prediction: about ")[1].split(" ")[0])
    assert kept == pytest.approx(120, abs=4)
    monkeypatch.setattr(module, "MAX_SAMPLES", 10**6)
    for path in sorted(Path(config.index_dir).rglob("*.parquet"))[:2]:
        path.unlink()
    said = dry_run(config)
    assert "the prediction comes from 4 of 6 shards" in said
    assert "2 shards have no index yet. `pairmill curate CONFIG 'stages=[scan]'` makes" in said
