"""Scores over real Ray: resumed, repeated, killed, never mixed, and what rules make of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from configs.errors import DataError, UsageError
from configs.load import to_yaml, validate
from curation.engine import Engine, Resources
from curation.index import add_columns, index_path, read_index_info
from curation.job import curate, dry_run
from curation.manifest import read_index
from curation.scan import InputShard, ScanTask
from curation.scoring import Output, RawSample, Scores, score, score_shard
from curation.task import Actor
from curation.vectors import read_vectors
from tests.small_model import write_small_model
from tools.score.config import ScoreConfig
from tools.score.job import dry_run as score_dry_run
from tools.score.job import run

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]
REFUSED = "not for this scorer"
BRIGHT = Output("brightness", "maker 1", "the mean of the bytes")
VECTORS = Output("parity", "maker 1", "odd and even", is_vectors=True)


@dataclass(frozen=True)
class Maker:
    """What an actor builds a test's scorer from."""

    dies_once: str | None = None  # the first actor that is to score ends its process
    fails: bool = False

    def build(self) -> ByteScorer:
        if self.fails:
            raise UsageError("this model cannot be loaded")
        return ByteScorer(self)


@dataclass(frozen=True)
class ByteScorer:
    """Judges an image by its bytes; one whose caption is REFUSED is none to it."""

    maker: Maker

    def score(self, samples: Iterable[RawSample], num: int, names: frozenset[str]) -> Scores:
        if self.maker.dies_once and not os.path.exists(self.maker.dies_once):
            Path(self.maker.dies_once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        found = Scores(columns={"brightness": np.full(num, np.nan, np.float32)})
        found.vectors["parity"] = np.full((num, 2), np.nan, np.float16)
        for row, sample in enumerate(samples):
            if sample.caption == REFUSED:
                found.bad[row] = "refused"
                continue
            found.columns["brightness"][row] = np.frombuffer(sample.image, np.uint8).mean()
            found.vectors["parity"][row] = (len(sample.image) % 2, 1)
        return found


def tasks_of(folder: Path) -> list[ScanTask]:
    return [
        ScanTask(input=InputShard(source="s", shard=p.name, path=str(p), index=index_path(p)))
        for p in sorted(folder.glob("*.tar"))
    ]


def score_all(folder, outputs=(BRIGHT, VECTORS), *, maker=None, actors=1, replace=False):
    with Engine() as engine:
        return score(
            tasks_of(folder),
            outputs,
            Maker.build,
            maker or Maker(),
            engine=engine,
            resources=Resources(num_actors=actors),
            replace=replace,
        )


@pytest.fixture(scope="module")
def scored(pool, tars, tmp_path_factory):
    """The pool's six shards, one with samples of every kind of damage and one that is no tar,
    scored by one actor: (folder, report).
    """
    folder = shutil.copytree(pool / "train", tmp_path_factory.mktemp("scored") / "shards")
    members = [*tars.sample("a", "a caption"), ("b.png", b"\x89PNG"), ("b.txt", b"no header")]
    members += [("c.txt", b"no image"), *tars.sample("d", "another", side=40)]
    members += [("e.png", tars.png(2, 2, 0)), ("e.txt", REFUSED.encode())]
    tars.write(folder / "odd.tar", members)
    (folder / "none.tar").write_bytes(b"no tar at all" * 100)
    return folder, score_all(folder)


@pytest.fixture
def folder(scored, tmp_path):
    """A copy of the scored shards, their indexes and vectors."""
    return shutil.copytree(scored[0], tmp_path / "copy")


def test_a_score_stands_in_the_row_of_its_sample(scored):
    folder, report = scored
    assert (report.num_samples, report.num_unreadable, report.num_bad) == (245, 2, 1)
    assert [line.rpartition("/")[2] for line in report.bad] == ["odd.tar: e (refused)"]
    assert [line.partition(":")[0].rpartition("/")[2] for line in report.quarantined] == [
        "none.tar"
    ]
    counts = report.columns["brightness"]
    assert (counts.counts.total(), counts.num_null) == (242, 3)
    for name in ("00002.tar", "odd.tar"):
        table, data = read_index(folder / name), (folder / name).read_bytes()
        vectors = read_vectors(index_path(folder / name), "parity")
        for number, row in enumerate(table.to_pylist()):
            if row["key"] in "bce":
                assert row["brightness"] is None
                assert np.isnan(vectors[number]).all()
                continue
            image = data[row["image_offset"] : row["image_offset"] + row["image_size"]]
            assert row["brightness"] == pytest.approx(np.frombuffer(image, np.uint8).mean())
            assert vectors[number].tolist() == [len(image) % 2, 1]


def test_two_actors_of_which_one_is_killed_and_a_run_in_parts_give_the_same_bytes(
    scored, folder, tars, tmp_path
):
    once = tars.hashes(scored[0])
    for path in folder.glob("0000[123].index*"):
        path.unlink()
    Path(folder, "00004.index.parity.npy").unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.glob("0000[05].index*")}
    report = score_all(folder, actors=2, maker=Maker(dies_once=str(tmp_path / "died")))
    assert (tmp_path / "died").exists()
    assert report.num_done_before == 3
    assert tars.hashes(folder) == once
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert report.columns == scored[1].columns
    # Done: no actor starts, so that a model that cannot be loaded is not missed.
    assert score_all(folder, maker=Maker(fails=True)).num_done_before == 7


def test_scores_of_another_maker_are_neither_taken_nor_replaced_unasked(scored, folder, tars):
    other = Output("brightness", "maker 2", "something else")
    with pytest.raises(UsageError, match="7 of 8 shards hold brightness of another model"):
        score_all(folder, (other,))
    assert tars.hashes(folder) == tars.hashes(scored[0])
    actor = Actor(Maker.build, Maker(fails=True))  # as Ray makes it, in this process
    assert str(actor.run(score_shard, None).error) == "this model cannot be loaded"
    # One shard is of a new tar: nothing of what was there is of it.
    tars.write(folder / "00003.tar", tars.sample("new", "a new caption", shade=3))
    report = score_all(folder, (other, VECTORS), replace=True)
    assert (report.num_done_before, report.num_samples) == (0, 206)
    assert read_index_info(folder / "00000.index.parquet").made_by == {"brightness": "maker 2"}
    assert len(read_vectors(folder / "00003.index.parquet", "parity")) == 1
    vectors = Path("00000.index.parity.npy")
    assert (folder / vectors).read_bytes() == (scored[0] / vectors).read_bytes()
    with Engine() as engine, pytest.raises(UsageError, match="an actor asks for 999 CPUs"):
        score(tasks_of(folder), (BRIGHT,), Maker.build, Maker(), engine=engine,
              resources=Resources(num_cpus=999), replace=True)  # fmt: skip


@pytest.fixture
def small_model(tmp_path):
    (tmp_path / "model").mkdir()
    return write_small_model(tmp_path / "model")


def by_model(folder: Path, model: Path, **changes) -> ScoreConfig:
    tree = {"name": "t", "sources": [{"name": "pool", "shards": str(folder)}],
            "model": {"checkpoint": str(model)}, "batch_size": 16, "actors": 1,
            "scores": [{"name": "clip_score"}, {"name": "image_quality"}, {"name": "embeddings"}],
            }  # fmt: skip
    return validate({**tree, **changes}, ScoreConfig, label="t")


@pytest.mark.slow
def test_a_models_score_is_a_column_to_rules_and_a_value_in_the_decisions(
    pool, job, tars, tmp_path, small_model
):
    folder = shutil.copytree(pool / "train", tmp_path / "shards")
    rules = [{"name": "score", "column": "entropy", "max": 0.5},
             {"name": "top_fraction", "column": "clip_score", "fraction": 0.5}]  # fmt: skip
    config = job(sources=[{"name": "pool", "shards": str(folder)}], index_dir=None, rules=rules)
    assert "`pairmill score` adds the scores: clip_score, entropy" in dry_run(config)
    with pytest.raises(UsageError, match=r"no column is called 'clip_score'.*`pairmill score`"):
        curate(config)
    scoring = by_model(folder, small_model)
    assert "have an index (the others are scanned first)" in score_dry_run(scoring)
    text = run(scoring)
    assert "240 samples in 6 shards, of which 0 were scored before" in text
    indexes = tars.hashes(folder)
    assert run(scoring).splitlines()[1:] == text.splitlines()[1:]
    assert tars.hashes(folder) == indexes
    assert "prediction: 120 of 240 samples" in dry_run(config)
    report = curate(config)
    assert report.counts["num_kept"] == 120  # a picture is of one grey: entropy 0
    found = report.content["scores"]["top_fraction"]
    assert (found["column"], found["num_scored"], found["num_left"]) == ("clip_score", 240, 120)
    assert found["dropped"][1] <= found["left"][0] < found["left"][1]
    assert {sample["outcome"] for sample in found["highest"]} == {"kept"}
    parts = [pq.read_table(p) for p in (Path(config.output + ".work") / "decisions").rglob("*.p*")]
    decisions = pa.concat_tables(parts)
    assert decisions["score.value"].to_pylist() == [0.0] * 240
    reasons = set(decisions["reason"].drop_null().to_pylist())
    assert reasons == {"top_fraction/not in the top fraction"}
    for path in folder.glob("*.tar"):
        index = read_index(path)
        image, text = (read_vectors(index_path(path), f"clip_{n}") for n in ("image", "text"))
        cosine = (image.astype(np.float32) * text.astype(np.float32)).sum(1)
        np.testing.assert_allclose(index["clip_score"].to_numpy(), cosine, atol=2e-3)


def test_decisions_follow_a_score_that_was_made_again_and_refuse_two_makers(folder, job):
    (folder / "none.tar").unlink()
    rules = [{"name": "score", "column": "brightness", "min": 0}]
    config = job(sources=[{"name": "s", "shards": str(folder)}], index_dir=None, rules=rules,
                 stages=["scan", "decide"])  # fmt: skip
    assert curate(config).counts["num_kept"] == 242
    for number, shard in enumerate(tasks_of(folder)):
        path = shard.input.index
        info = read_index_info(path)
        lower = pa.array([-1.0] * info.num_samples, pa.float32())
        add_columns(path, {"brightness": lower}, info, made_by={"brightness": "2"})
        if number == 0:
            with pytest.raises(DataError, match="'brightness' was made by two models or settings"):
                curate(config)
    assert curate(config).counts["num_kept"] == 0


def test_a_job_that_reads_scored_tars_otherwise_does_not_throw_the_scores_away(folder, job, tars):
    (folder / "none.tar").unlink()
    before = tars.hashes(folder)
    changes = {"index_dir": None, "rules": [], "stages": ["scan"]}
    for other in (
        {"sources": [{"name": "other", "shards": str(folder)}]},
        {"sources": [{"name": "s", "shards": str(folder)}], "max_image_pixels": 999},
    ):
        config = job(**changes, **other)
        for act in (dry_run, curate):
            with pytest.raises(UsageError, match=r"brightness, parity, and this job reads .*anew"):
                act(config)
    assert tars.hashes(folder) == before
    # A tar that changed is another tar: its scores are of no use.
    tars.write(folder / "00003.tar", tars.sample("new", "a new caption", shade=3))
    for path in [*folder.glob("0000[01245].*"), *folder.glob("odd.*")]:
        path.unlink()
    assert curate(job(**changes, sources=[{"name": "o", "shards": str(folder)}])).counts == {
        "num_read": 1, "unreadable": {}, "quarantined": []
    }  # fmt: skip


@pytest.mark.soak
def test_a_job_killed_at_any_moment_goes_on_to_the_bytes_of_one_actor(
    pool, tars, tmp_path, small_model
):
    """A model, two actors, the driver killed once some shards are done, against one actor."""
    folders = [shutil.copytree(pool / "train", tmp_path / name) for name in ("once", "killed")]
    assert "of which 0 were scored before" in run(by_model(folders[0], small_model, actors=1))
    config = by_model(folders[1], small_model, actors=2)
    path = tmp_path / "score.yaml"
    path.write_text(to_yaml(config))
    for pattern in ("0000?.index.parquet", "0000?.index.clip_text.npy"):
        driver = subprocess.Popen(
            [sys.executable, "-m", "tools.cli", "score", str(path)],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 400
        while driver.poll() is None and time.monotonic() < deadline:
            if list(folders[1].glob(pattern)):
                break
            time.sleep(0.002)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    run(config)
    assert tars.hashes(folders[1]) == tars.hashes(folders[0])
