"""Filters and de-duplication on real pairs: ../shared/data, which is no part of the project."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.load import load_config
from configs.registry import Registry
from curation.config import CurateConfig
from curation.filters import base, filters
from curation.scan import InputShard, ScanTask, scan_shard

ROOT = Path(__file__).resolve().parents[2]


def need(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def test_file_names_of_photographs_are_found_as_their_referee_says(tars, tmp_path):
    path = need(tars.shared / "data" / "photos-flickr" / "train.tar")
    shard = InputShard(source="s", shard="train.tar", path=path, index=tmp_path / "i.parquet")
    scan_shard(ScanTask(input=shard, columns=("json.title_is_filename",)))
    table = pq.read_table(shard.index)
    is_file_name = [text == "true" for text in table["json.title_is_filename"].to_pylist()]
    reasons = filters["file_name"]()(table).reasons.to_pylist()
    is_dropped = [reason is not None for reason in reasons]
    hits = sum(a and b for a, b in zip(is_dropped, is_file_name, strict=True))
    recall, precision = hits / sum(is_file_name), hits / sum(is_dropped)
    print(f"recall {recall:.4f}, precision {precision:.4f}, n {sum(is_file_name)}")
    print(Counter(filter(None, reasons)))
    assert recall >= 0.95
    assert precision >= 0.95


def test_webs_captions_are_seldom_taken_for_file_names(tars):
    import gzip

    captions = {}
    for name in ("laion400m-10k", "cc3m-val-15k"):
        path = need(tars.shared / "data" / "captions" / f"{name}.tsv.gz")
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            captions[name] = [line.rstrip("\n").split("\t")[1] for line in lines]
    for name, most in (("laion400m-10k", 0.015), ("cc3m-val-15k", 0.001)):
        reasons = filters["file_name"]()(pa.table({"caption": captions[name]})).reasons
        assert len(reasons) - reasons.null_count <= most * len(reasons)


@pytest.mark.ray
@pytest.mark.slow
def test_the_report_of_clip_art_shows_where_its_noise_went(tars, tmp_path, ray_session):
    from curation.job import curate

    need(tars.shared / "data" / "openclipart" / "train.tar")
    metadata = need(tars.shared / "data" / "metadata" / "wordnet-lemmas.json.gz")
    config = load_config(
        "demo/openclipart",
        CurateConfig,
        [
            f"output={tmp_path / 'dataset'}",
            f"index_dir={tmp_path / 'indexes'}",
            f"sources.0.shards={tars.shared / 'data' / 'openclipart' / 'train.tar'}",
            f"rules.5.metadata={metadata}",
        ],
    )
    report = curate(config).content
    assert report["num_read"] == 7171
    outcomes = {row["caption"]: row["outcomes"] for row in report["captions"]["caption_count"]}
    assert outcomes["gramastar"] == {"caption_count/too frequent": 1375}
    assert outcomes["Lemon SVG theme"] == {"caption_count/too frequent": 431}
    assert sum(sum(found.values()) for found in outcomes.values()) == sum(
        row["count"] for row in report["captions"]["caption_count"]
    )
    dropped = report["dropped"]
    found = report["duplicates"]["dedup"]
    assert found["num_dropped"] == sum(n for why, n in dropped.items() if why[:6] == "dedup/") > 500
    assert len(found["groups"]) == 24
    images = {"dedup/same image": 0, "dedup/similar image": 0}
    for group in found["groups"]:
        assert 1 <= len(group["dropped"]) <= group["num_dropped"]
        for sample in group["dropped"]:
            assert len(group["best"]["caption"]) >= len(sample["caption"])
    assert images.keys() <= dropped.keys()
    # What was dropped as the same image has the same bytes as a sample that ranks better.
    decisions = pq.read_table(
        tmp_path / "dataset.work" / "decisions" / "openclipart" / "train.parquet"
    )
    index = pq.read_table(tmp_path / "indexes" / "openclipart" / "train.index.parquet")
    hashes = dict(zip(index["uid"].to_pylist(), index["image_hash"].to_pylist(), strict=True))
    left = Counter()
    for row in decisions.to_pylist():
        if row["reason"] == "dedup/same image":
            assert hashes[row["uid"]] == hashes[row["dedup.duplicate_of"]]
        elif row["reason"] is None:
            left[hashes[row["uid"]]] += 1
    assert max(left.values()) == 1


def test_the_example_of_a_new_filter_works_as_it_stands(monkeypatch):
    text = (ROOT / "curation" / "filters" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    fresh = Registry("filter")
    monkeypatch.setattr(base, "filters", fresh)
    exec(compile(code, "capitals.py", "exec"), {"__name__": "capitals"})
    judge = fresh.section("capitals").model_validate({"name": "capitals", "max_share": 0.7}).build()
    values, reasons = judge(pa.table({"caption": ["BUY NOW", "a red Cat", "", "HIGH tide"]}))
    assert values["share"].to_pylist() == [1.0, 1 / 7, 0.0, 0.5]
    assert reasons.to_pylist() == ["too many capitals", None, None, None]
    yaml = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]
    assert "name: capitals" in yaml


@pytest.mark.parametrize("folder", ["filters", "dedup"])
def test_every_rule_has_its_row_in_the_readme(folder):
    from curation.global_rules import global_rules

    text = (ROOT / "curation" / folder / "README.md").read_text()
    names = list(filters) if folder == "filters" else ["dedup", "caption_count"]
    assert set(names) <= set(filters) | set(global_rules)
    for name in names:
        assert f"| `{name}` |" in text
        rule = filters[name] if folder == "filters" else global_rules[name]
        assert rule.__doc__
