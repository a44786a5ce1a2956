"""Jobs with selectors on a real Ray, from vectors on disk to the written dataset and its report."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from configs.errors import DataError
from curation.index import read_index_file
from curation.job import curate, dry_run
from curation.vectors import write_vectors

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
DIM = 8


def give_vectors(folder, *, scale=1.0):
    """Write vectors for the indexes below a folder: by uid, so that each sample has its own."""
    for path in sorted(folder.rglob("*.index.parquet")):
        uids = read_index_file(path, ["uid"])["uid"].to_pylist()
        rows = [np.random.default_rng(uid[0] % 40).standard_normal(DIM) for uid in uids]
        array = (np.array(rows) + scale * 0.001 * np.arange(DIM)).astype(np.float16)
        array[::29] = np.nan
        write_vectors(path, "image", array)
        write_vectors(path, "text", array[:, ::-1].copy())


@pytest.fixture
def rules(tmp_path):
    """Every selector, one after the other."""
    np.save(tmp_path / "targets.npy", np.random.default_rng(1).standard_normal((5, DIM)))
    target = str(tmp_path / "targets.npy")
    return [
        {"name": "caption_length", "min_words": 2},
        {"name": "clusters", "vectors": "image", "num_clusters": 8, "target": target,
         "missing": "drop"},
        {"name": "image_based"},
        {"name": "semdedup", "vectors": "image", "max_similarity": 0.99, "keep": ["easy"]},
        {"name": "semantic_balance", "vectors": "image", "max_per_cluster": 3},
        {"name": "poison", "vectors": "image", "k": 2, "remove": 0.1},
        {"name": "m4", "keep_fraction": 0.8,
         "sensitive": [{"attribute": "red", "share": 0.5, "words": ["red", "big", "cat"]},
                       {"attribute": "thing", "share": 0.5, "words": ["thing"]}]},  # all have it
        {"name": "clipcov", "images": "image", "texts": "text", "fraction": 0.8},
    ]  # fmt: skip


def decisions(config):
    paths = sorted(config.work_dir.glob("decisions/**/*.parquet"))
    return [row for path in paths for row in pq.read_table(path, partitioning=None).to_pylist()]


def test_selectors_in_a_job_from_vectors_to_dataset(job, rules, pool, tmp_path):
    sources = [{"name": "pool", "shards": str(pool / "train" / "0000[0-2].tar")}]
    config = job(rules=rules, sources=sources)
    curate(config.model_copy(update={"stages": ("scan",)}))
    assert "and the vectors image" in dry_run(config)
    with pytest.raises(DataError, match=r"\.index\.image\.npy: there are no such vectors.*score"):
        curate(config)
    give_vectors(tmp_path / "indexes")
    said = dry_run(config)
    done = curate(config)
    report = done.content
    warned = "warning: m4: not all constraints can be met (keep_fraction 0.8 of this pool): 'thing'"
    assert warned in said
    assert warned in done.text()
    assert len(report["solutions"]["m4"]["warnings"]) == 1
    similarities = report["scores"]["semdedup"]
    assert similarities["left"][1] <= 0.99 < similarities["dropped"][0]
    assert f"{report['num_kept']:,} of 120 samples kept" in said
    dropped = {reason.split("/")[0] for reason in report["dropped"]}
    assert dropped == {rule["name"] for rule in rules}
    assert report["num_kept"] + report["num_dropped"] == 120
    groups = report["duplicates"]["semdedup"]
    assert groups["num_dropped"] == report["dropped"]["semdedup/semantic duplicate"]
    assert all(member["caption"] for group in groups["groups"] for member in group["dropped"])
    far, near = report["outliers"]["poison.score"], report["outliers"]["clusters.similarity"]
    rows = decisions(config)
    for found, sign, column in ((far, -1, "poison.score"), (near, 1, "clusters.similarity")):
        values = [row[column] for row in rows if row[column] is not None]
        expected = sorted(values, key=lambda value, sign=sign: sign * value)[:24]
        assert [sample["value"] for sample in found["samples"]] == expected
    assert far["samples"][0]["outcome"] == "poison/suspicious"
    solution = report["solutions"]["clusters"]
    assert solution["num_without_vector"] == report["dropped"]["clusters/no vector"]
    # Another number of workers; then other vectors, which nothing of before is used for.
    stages = ["scan", "decide"]
    changes = {"sources": sources, "stages": stages, "engine": {"num_workers": 1}}
    other = job(rules=rules, output=str(tmp_path / "other"), **changes)
    curate(other)
    assert decisions(other) == rows
    give_vectors(tmp_path / "indexes", scale=50)
    first_two = job(rules=rules[:2], output=str(tmp_path / "other"), **changes)
    curate(first_two)
    changed = json.loads((first_two.work_dir / "solutions.json").read_text())
    assert changed["clusters"]["centroids_digest"] != solution["centroids_digest"]
