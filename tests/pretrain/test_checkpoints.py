"""Checkpoints: stopped and resumed = uninterrupted, on any number of ranks and at any ZeRO stage;
averaged weights; what is kept; the state files and their remote copies.
"""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from configs.errors import CheckpointError
from pretrain.checkpoint import CheckpointRecord, read_record, superseded, usable_checkpoints
from pretrain.config import IntervalConfig
from pretrain.remote_checkpoints import Mirror
from pretrain.resume import inexact_reasons
from pretrain.saving import device_name, versions
from pretrain.state_files import Layout, StateReader, state_file, write_state
from tests.pretrain.conftest import make_config, run_ranks
from tests.pretrain.test_train import equal, rows, weights, write_config
from tests.s3 import s3_server

STAGES = (0, 1, 2, 3)
INTERVALS = {
    "log_samples": 16, "checkpoint_samples": 48, "keep_checkpoints": 2, "keep_every_samples": 64
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(dataset, model_file, tmp_path_factory):
    """Runs of 10 steps on two ranks in one launch: at each ZeRO stage one that goes through, one
    that is stopped after 4 and after 7 steps, and one that stays where it was stopped, after 5.
    """
    folder = tmp_path_factory.mktemp("runs")
    words = []
    for stage in STAGES:
        for name, stops in {"whole": [0], "parts": [4, 7, 0], "half": [5]}.items():
            engine = {"zero_stage": stage, "num_threads": 1}
            config = make_config(dataset, model_file, folder / f"{name}{stage}", engine=engine,
                                 intervals=INTERVALS, ema={"half_life_samples": 64})  # fmt: skip
            words += [word for at in stops for word in (write_config(config), str(at))]
    return folder, run_ranks("train", 2, *words)


def state(run: Path) -> dict[str, torch.Tensor]:
    """All of the newest training state, whole, by KIND/NAME."""
    reader = StateReader(usable_checkpoints(run / "checkpoints")[0] / "engine")
    kinds = ("weight", "exp_avg", "exp_avg_sq", "ema")
    found = {f"{k}/{n}": reader.whole(k, n).clone() for k in kinds for n in reader.names(k)}
    assert {key.partition("/")[0] for key in found} == set(kinds)
    return found


def keys(run: Path) -> dict[int, set[str]]:
    """The keys of each global batch, by the samples seen before it."""
    found: dict[int, set[str]] = {}
    for path in run.glob("keys-*.jsonl"):
        for seen, names in map(json.loads, path.read_text().splitlines()):
            found.setdefault(seen, set()).update(names)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_stopped_and_resumed_twice_equals_uninterrupted_to_the_last_bit(runs, stage):
    folder, said = runs
    whole, parts = folder / f"whole{stage}", folder / f"parts{stage}"
    assert equal(state(whole), state(parts))
    assert equal(weights(whole), weights(parts))
    assert rows(whole) == rows(parts)
    assert [row["step"] for row in rows(parts)] == list(range(1, 11))
    assert f"parts{stage}/checkpoints/samples-000000000112 at 112 samples, bit for bit" in said
    kept = [path.name for path in usable_checkpoints(parts / "checkpoints")]
    assert kept == ["samples-000000000160", "samples-000000000144", "samples-000000000064"]


@pytest.mark.distributed
def test_averaged_weights_stand_beside_the_raw_ones_and_are_their_average(runs):
    run = runs[0] / "whole1"
    newest = usable_checkpoints(run / "checkpoints")[0]
    averaged = load_file(newest / "model_ema/open_clip_model.safetensors")
    raw, decay = weights(run), 0.5 ** (16 / 64)
    assert averaged.keys() == raw.keys()
    assert not torch.equal(averaged["visual.proj"], raw["visual.proj"])
    names = {path.name for path in (newest / "model").iterdir()}
    assert names == {path.name for path in (newest / "model_ema").iterdir()}
    # 144 -> 160 samples is one step: the recursion, from two checkpoints of one run
    before = load_file(newest.with_name("samples-000000000144") / "model_ema/"
                       "open_clip_model.safetensors")  # fmt: skip
    for name, tensor in raw.items():
        expected = before[name] * decay + tensor * (1 - decay)
        torch.testing.assert_close(averaged[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "before", "stage"), [(1, 1, 0), (4, 0, 1)])
def test_two_ranks_resumed_on_one_and_on_four_and_at_another_stage_see_the_same_samples(
    runs, dataset, model_file, tmp_path, ranks, before, stage
):
    run, whole = tmp_path / "run", runs[0] / f"whole{before}"
    shutil.copytree(runs[0] / f"half{before}", run)
    config = make_config(dataset, model_file, run, intervals=INTERVALS,
                         engine={"zero_stage": stage, "num_threads": 1},
                         ema={"half_life_samples": 64})  # fmt: skip
    said = run_ranks("train", ranks, write_config(config), "0")
    assert "at 80 samples: the same samples, but equal to rounding only:" in said
    assert f"2 ranks wrote it and {ranks} rank" in said
    assert f"ZeRO stage {before} before, {stage} now" in said
    assert keys(run) == keys(whole)
    for here, there in zip(rows(run), rows(whole), strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=2e-5)
    for name, tensor in state(run).items():  # Adam magnifies rounding: closeness, not equality
        torch.testing.assert_close(tensor, state(whole)[name], atol=2e-3, rtol=0)


@given(st.data())
def test_any_part_of_a_tensor_is_read_back_from_any_cut_into_files(tmp_path_factory, data):
    size = data.draw(st.integers(1, 60))
    cuts = sorted(data.draw(st.sets(st.integers(0, size), max_size=4)) | {0, size})
    folder, tensor = tmp_path_factory.mktemp("state"), torch.rand(size)
    for rank, (first, last) in enumerate(pairwise(cuts)):
        layout = Layout({"weight/a": first}, {"a": [size]}, {"a": {"step": 3.0}})
        write_state(state_file(folder, rank), {"weight/a": tensor[first:last]}, layout)
    start = data.draw(st.integers(0, size - 1))
    length = data.draw(st.integers(1, size - start))
    reader = StateReader(folder)
    assert torch.equal(reader.read("weight", "a", start, length), tensor[start : start + length])
    assert reader.scalars["a"] == {"step": 3.0}
    with pytest.raises(CheckpointError, match=r"elements from .* are missing"):
        reader.read("weight", "a", start, size - start + 1)


def test_a_state_file_without_pickle_is_one_of_safetensors_and_its_digest_is_that_of_its_bytes(
    tmp_path,
):
    from pretrain.checkpoint import file_digest

    tensors = {"weight/a": torch.rand(3), "random/cpu": torch.get_rng_state(),
               "exp_avg/a": torch.rand(5).bfloat16(), "weight/b": torch.arange(4)}  # fmt: skip
    path = state_file(tmp_path, 0)
    digest = write_state(path, tensors, Layout({}, {}, {}))
    assert digest == file_digest(path)
    assert equal(load_file(path), tensors)


def test_the_newest_and_the_first_of_each_period_are_kept():
    names = [f"samples-{n:012d}" for n in range(10, 101, 10)]
    assert superseded(names, keep=2, keep_every=None) == names[:-2]
    gone = superseded(names, keep=1, keep_every=25)
    kept = [int(name[-4:]) for name in names if name not in gone]
    assert kept == [30, 50, 80, 100]
    left = [name for name in names if name not in gone]
    assert superseded(left, keep=1, keep_every=25) == []  # what was kept once stays


def record(**changes: object) -> CheckpointRecord:
    return CheckpointRecord(
        **{
            "version": 2, "samples_seen": 0, "step": 0, "skipped_samples": 0, "config_digest": "",
            "manifest_digest": "", "world_size": 1, "threads": torch.get_num_threads(),
            "zero_stage": 1, "device": device_name(torch.device("cpu")), "versions": versions(),
            "files": {}, **changes,
        }
    )  # fmt: skip


def test_a_resume_that_cannot_be_exact_says_why_in_one_sentence_each():
    parts = SimpleNamespace(
        group=SimpleNamespace(size=1),
        engine=SimpleNamespace(device=torch.device("cpu")),
        stage=SimpleNamespace(config=SimpleNamespace(engine=SimpleNamespace(zero_stage=1))),
    )
    assert inexact_reasons(record(), parts) == []
    threads = torch.get_num_threads()
    changed = record(world_size=64, threads=99, zero_stage=3, device="NVIDIA H200",
                     versions={**versions(), "torch": "2.4.0"})  # fmt: skip
    said = "\n".join(inexact_reasons(changed, parts))
    assert "64 ranks wrote it and 1 rank go on" in said
    assert f"99 threads a rank before, {threads} now" in said
    assert "ZeRO stage 3 before, 1 now" in said
    assert "the device was NVIDIA H200 and is cpu" in said
    assert f"torch was 2.4.0 and is {versions()['torch']}." in said
    assert said.count("\n") == 4


@pytest.mark.distributed
def test_checkpoints_are_copied_to_s3_and_an_empty_run_starts_from_the_newest_sound_copy(
    runs, tmp_path, monkeypatch, capsys
):
    source = runs[0] / "whole1/checkpoints"
    names = sorted(path.name for path in usable_checkpoints(source))
    with s3_server(monkeypatch) as s3:
        s3.upload(runs[0] / "whole1/checkpoints/latest", "bucket/other")  # makes the bucket
        mirror = Mirror("s3://bucket/run", IntervalConfig(keep_checkpoints=9))
        mirror.push(source)
        mirror.wait()
        assert mirror.names() == names
        restored = mirror.restore(tmp_path / "checkpoints")
        assert restored is not None
        assert read_record(restored) == read_record(source / names[-1])

        s3.upload(source / names[0] / "model", f"bucket/run/{names[-1]}/model")  # another's weights
        shutil.rmtree(tmp_path / "checkpoints")
        restored = mirror.restore(tmp_path / "checkpoints")
        assert restored is not None
        assert restored.name == names[-2]
        assert (
            "is damaged: model/open_clip_model.safetensors has changed" in capsys.readouterr().err
        )

        fewer = Mirror("s3://bucket/run", IntervalConfig(keep_checkpoints=1))
        fewer.push(source)
        fewer.wait()
        assert fewer.names() == names[-1:]
    mirror.push(source)  # the server is gone
    mirror.wait()
    assert "WARNING: the copy of the checkpoints to s3://bucket/run failed" in (
        capsys.readouterr().err
    )
