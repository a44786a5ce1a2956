"""What must not change a result: ranks, a kill, the cache, parts of an array."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from arrays import make_subject
from safetensors.torch import load_file, save_file
from test_methods import One
from test_suite import make_config

from configs.errors import DataError, UsageError
from configs.load import to_yaml, validate
from evaluation import encoder as encoder_module
from evaluation import interpolated, suite
from evaluation.cache import FeatureCache, describe
from evaluation.jobs import jobs_of, parse_part
from evaluation.result import Result, read_results
from evaluation.suite import evaluate
from tests import warm

METHODS = [{"name": "zero_shot"}, {"name": "calibration"}, {"name": "selective"}]


def plain(rows: list[Result]) -> list[dict[str, object]]:
    return [row.model_dump(exclude={"seconds", "config_digest"}) for row in rows]


def test_a_killed_run_goes_on_and_gives_the_same(
    tmp_path: Path,
    classification: Path,
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = evaluate(
        make_config(tmp_path / "a", classification, methods=METHODS), [str(run_folder)]
    )
    config = make_config(tmp_path / "b", classification, methods=METHODS)
    real_put, real_publish, calls = FeatureCache.put_part, suite.publish_results, []

    def killed_while_encoding(self: FeatureCache, key: str, number: int, *rest: object) -> None:
        if number == 1:
            raise KeyboardInterrupt
        real_put(self, key, number, *rest)

    monkeypatch.setattr(FeatureCache, "put_part", killed_while_encoding)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, [str(run_folder)])
    numbers: list[int] = []

    def counted(self: FeatureCache, key: str, number: int, *rest: object) -> None:
        numbers.append(number)
        real_put(self, key, number, *rest)

    def killed_after_one_method(folder: Path, rows: list[Result]) -> Path:
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real_publish(folder, rows)

    monkeypatch.setattr(FeatureCache, "put_part", counted)
    monkeypatch.setattr(suite, "publish_results", killed_after_one_method)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, [str(run_folder)])
    assert numbers == [1, 2]  # batch 0 was kept
    assert {row.method for row in read_results(tmp_path / "b" / "results.jsonl")} == {"zero_shot"}
    monkeypatch.setattr(suite, "publish_results", real_publish)
    assert plain(evaluate(config, [str(run_folder)])) == plain(whole)


def test_a_second_run_and_a_new_method_take_features_from_the_cache(
    tmp_path: Path, classification: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path / "out", classification)
    first = evaluate(config, [str(run_folder)])

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(encoder_module, "load_encoder", never)
    assert evaluate(config, [str(run_folder)]) == first  # nothing is computed again
    more = make_config(
        tmp_path / "more", classification, methods=METHODS, cache=str(tmp_path / "out" / "cache")
    )
    again = evaluate(more, [str(run_folder)])
    both = [row for row in again if row.method == "zero_shot"]
    assert [row.value for row in both] == [row.value for row in first]
    more = make_config(tmp_path / "out", classification, predictions=True)
    again = evaluate(more, [str(run_folder)])
    assert [row.value for row in again] == [row.value for row in first]
    assert list((tmp_path / "out" / "predictions").glob("*.npz"))
    text = describe(tmp_path / "out" / "cache")
    assert "colours (test)" in text
    assert "3 entries" in text
    entry = next((tmp_path / "out" / "cache").glob("*/features.npy"))
    entry.write_bytes(b"damaged")
    with pytest.raises(DataError, match="Remove the folder; they are computed again"):
        FeatureCache(tmp_path / "out" / "cache").get(entry.parent.name)


def test_two_runs_that_encode_the_same_at_once_both_finish_and_leave_nothing(
    tmp_path: Path, classification: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "cache")
    config = make_config(tmp_path / "a", classification, cache=cache)
    other = make_config(tmp_path / "b", classification, cache=cache)
    real_put, real_save = FeatureCache.put_part, np.savez
    rows: list[Result] = []
    started: list[int] = []

    def while_the_other_finishes(self: FeatureCache, key: str, number: int, *rest: object) -> None:
        if number == 1 and not started:
            started.append(number)
            rows.extend(evaluate(other, [str(run_folder)]))
        if number == 2 and rows:  # the other removes its parts while this one is being written

            def removed(*args: object, **arrays: object) -> None:
                real_save(*args, **arrays)
                shutil.rmtree(self._parts(key))

            monkeypatch.setattr(np, "savez", removed)
        real_put(self, key, number, *rest)
        monkeypatch.setattr(np, "savez", real_save)

    monkeypatch.setattr(FeatureCache, "put_part", while_the_other_finishes)
    assert plain(evaluate(config, [str(run_folder)])) == plain(rows)
    assert not list(Path(cache).glob(".parts-*"))
    monkeypatch.setattr(FeatureCache, "put_part", real_put)
    monkeypatch.setattr(FeatureCache, "join_parts", lambda *_: Path("/nowhere").read_bytes())
    config = make_config(tmp_path / "c", classification, cache=str(tmp_path / "emptied"))
    with pytest.raises(DataError, match="were removed while they were computed"):
        evaluate(config, [str(run_folder)])


def test_a_job_with_another_encoder_is_done_again_where_that_one_changed(tmp_path: Path) -> None:
    few_shot = {"name": "few_shot", "learners": [{"name": "amu_tuning"}]}
    subject, config = make_subject(), make_config(tmp_path / "out", tmp_path)
    identity = SimpleNamespace(digest="d", setting_digest="s")

    def digest(auxiliary: str) -> str:
        section = validate({"method": few_shot | {"auxiliary": auxiliary}}, One, label="test")
        jobs, _ = jobs_of(config, identity, subject.dataset, [section.method], {})  # type: ignore[arg-type]
        return jobs[0].digest

    files = f"file:{tmp_path}"
    found = []
    for width in (2, 3, 2):
        np.save(tmp_path / "train.npy", np.zeros((1, width)))
        found.append(digest(files))
    assert found[0] == found[2] != found[1]
    assert len({digest("timm:vit_tiny"), digest("timm:vit_small"), digest("pixels")}) == 3


def test_parts_of_a_queue_together_are_the_whole(
    tmp_path: Path,
    classification: Path,
    retrieval_data: Path,
    run_folder: Path,
    open_clip_folder: Path,
) -> None:
    both = [str(run_folder), str(open_clip_folder)]
    whole = evaluate(make_config(tmp_path / "a", classification, retrieval_data), both)
    config = make_config(tmp_path / "b", classification, retrieval_data)
    counts = [len(evaluate(config, both, (place, 3))) for place in (2, 0, 1)]
    assert counts[0] < counts[1] < counts[2]
    assert plain(read_results(tmp_path / "b" / "results.jsonl")) == plain(whole)
    assert parse_part("2/3") == (1, 3)
    for text in ("0/3", "4/3", "a/b", "slurm"):
        with pytest.raises(UsageError, match="expected I/N"):
            parse_part(text)


def test_a_slurm_array_task_takes_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ID", "12"), ("COUNT", "4"), ("MIN", "10")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert parse_part("slurm") == (2, 4)


@pytest.mark.distributed
def test_two_ranks_share_the_images_and_give_the_same_bits(
    tmp_path: Path, classification: Path, retrieval_data: Path, run_folder: Path
) -> None:
    outputs = []
    for ranks in (1, 2):
        config = make_config(tmp_path / str(ranks), classification, retrieval_data)
        path = tmp_path / f"{ranks}.yaml"
        path.write_text(to_yaml(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes = [
            warm.start(
                "tools.cli",
                ["evaluate", str(run_folder), str(path)],
                **common,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
            )
            for rank in range(ranks)
        ]
        said = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.wait() for process in processes] == [0] * ranks, "\n".join(said)
        cache = FeatureCache(tmp_path / str(ranks) / "cache")
        stored = {key: cache.get(key).feature_nD for key, _, _ in cache.entries()}
        outputs.append((plain(read_results(tmp_path / str(ranks) / "results.jsonl")), stored))
    (rows, stored), (other_rows, other_stored) = outputs
    assert rows == other_rows
    assert stored.keys() == other_stored.keys()
    assert all(torch.equal(stored[key], other_stored[key]) for key in stored)


def test_wise_ft_evaluates_models_on_the_way_to_a_checkpoint(
    tmp_path: Path, classification: Path, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(run_folder / "checkpoints" / "samples-000000001280" / "model", changed)
    weights = load_file(changed / "open_clip_model.safetensors")
    save_file(
        {name: tensor * 1.5 for name, tensor in weights.items()},
        changed / "open_clip_model.safetensors",
    )
    wise = {"zero": str(run_folder), "alphas": [0.0, 1.0]}
    config = make_config(tmp_path / "out", classification, wise_ft=wise)
    others: list[int] = []

    def while_another_task_writes_it(*args: object) -> None:
        if not others:
            others.append(1)
            interpolated.interpolations(
                str(run_folder), [str(changed)], [0.0, 1.0], config.cache, "raw"
            )
        save_file(*args)

    monkeypatch.setattr(interpolated, "save_file", while_another_task_writes_it)
    evaluate(config, [str(changed)])
    assert not list((config.cache / "wise_ft").glob(".*"))
    rows = read_results(tmp_path / "out" / "results.jsonl")
    values = {row.checkpoint: row.value for row in rows if row.metric == "top1"}
    assert len(values) == 3
    start = evaluate(make_config(tmp_path / "zero", classification), [str(run_folder)])
    at = {name.rpartition("alpha")[2]: value for name, value in values.items()}
    assert at["0"] == next(row.value for row in start if row.metric == "top1")
    assert at["1"] == values[str(changed)]
