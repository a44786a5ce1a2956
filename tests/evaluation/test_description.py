"""Datasets as YAML, remote folders, suites, averages and the comparison with published tables."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import png, write_classification, write_tar
from test_suite import make_config

from configs.errors import ConfigError, DataError
from configs.load import SHIPPED, load_config, validate
from evaluation.average import (
    PUBLISHED_AVERAGE,
    PublishedRow,
    average_row,
    lint,
    lint_table,
    published_average,
    read_published_table,
)
from evaluation.config import DatasetConfig, EvaluateConfig
from evaluation.datasets import Absent, load_dataset, load_datasets
from evaluation.listing import list_all, list_suite
from evaluation.predictions import compare, read_predictions
from evaluation.result import read_results
from evaluation.suite import evaluate
from tools import cli

PUBLISHED = Path(__file__).resolve().parents[3] / "shared/golden/published/openclip_results.csv"


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    members = []
    for i in range(60):
        fields = {"title": f"title {i // 3}", "kind": "ab"[i % 2], "wrong": [f"not {i}"]}
        members += [
            (f"{i}.png", png(i, i % 3)),
            (f"{i}.cls", b"%d" % (i % 3)),
            (f"{i}.txt", f"caption {i}".encode()),
            (f"{i}.json", json.dumps(fields).encode()),
        ]
    write_tar(tmp_path / "pool.tar", members)
    return tmp_path


TEXT = """
images: [pool.tar]
labels: cls
classes: [red, green, blue]
captions: [txt, "json:title"]
groups: {kind: "json:kind"}
prompts: {per_class: {red: [a, b], green: [c], blue: [d, e, f]}}
split: {by: "json:title", val: 0.2, test: 0.4}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "data.yaml"
    path.write_text(text)
    return path


def test_a_description_says_where_everything_is(pool: Path) -> None:
    dataset = load_dataset(DatasetConfig(path=str(write(pool, TEXT))))
    parts = {split: dataset.part(split) for split in ("train", "val", "test")}
    assert sum(len(part.samples) for part in parts.values()) == 60
    titles = {s: {int(x.key) // 3 for x in part.samples} for s, part in parts.items()}
    assert not titles["train"] & titles["test"]  # equal titles stay together
    assert not titles["val"] & titles["test"]
    test = dataset.test
    number = int(test.samples[0].key)
    assert test.labels()[0] == number % 3
    assert test.captions[:2] == (f"caption {number}", f"title {number // 3}")
    assert test.groups["kind"].names == ("a", "b")
    assert dataset.prompts is not None
    assert dataset.prompts.of(2) == ["d", "e", "f"]
    assert len({part.data_digest for part in parts.values()}) == 3


def test_one_description_is_a_dataset_of_classes_and_one_of_captions(
    pool: Path, open_clip_folder: Path
) -> None:
    write(pool, TEXT)
    both = [
        {"path": str(pool / "data.yaml"), "name": task, "task": task}
        for task in ("zero_shot", "retrieval")
    ]
    rows = evaluate(make_config(pool / "out", datasets=both), [str(open_clip_folder)])
    found = {(row.dataset, row.metric): row for row in rows}
    images = found["zero_shot", "top1"].n
    assert found["retrieval", "i2t_recall@1"].n == images
    assert found["retrieval", "t2i_recall@1"].n > images  # a caption and a title each
    assert found["retrieval", "t2i_recall@5"].chance == pytest.approx(5 / images)


def test_a_selection_dataset_has_distractors_and_a_table_may_list_images(
    pool: Path, open_clip_folder: Path
) -> None:
    text = """
task: selection
images: [pool.tar]
captions: [txt]
distractors: ["json:wrong"]
groups: {kind: "json:kind"}
"""
    path = write(pool, text)
    assert load_dataset(DatasetConfig(path=str(path))).test.distractors[3] == ("not 3",)
    rows = evaluate(make_config(pool / "out", path), [str(open_clip_folder)])
    assert [row.metric for row in rows] == ["text_acc", "text_acc_by_kind"]
    assert rows[0].chance == 0.5
    (pool / "one.png").write_bytes(png(1, 1))
    (pool / "list.jsonl").write_text('{"image": "one.png", "name": "green"}\n')
    text = (
        "images: [list.jsonl]\nlabels: name\nclasses: [red, green]\nprompts: {templates: ['{c}']}"
    )
    table = load_dataset(DatasetConfig(path=str(write(pool, text))))
    assert table.test.labels().tolist() == [1]
    (pool / "list.jsonl").write_text('{"image": "../one.png", "name": "green"}\n')
    with pytest.raises(DataError, match="there is no image"):
        load_dataset(DatasetConfig(path=str(write(pool, text))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("labels: cls", ""), "zero_shot needs `labels`"),
        (("images: [pool.tar]", "images: [gone.tar]"), "there is no file"),
        (("[red, green, blue]", "[red]"), "no prompt|has the label"),
        (("images:", "imagse:"), "imagse"),
    ],
)
def test_a_wrong_description_is_refused_with_the_reason(
    pool: Path, change: tuple[str, str], message: str
) -> None:
    path = write(pool, TEXT.replace(*change))
    with pytest.raises((DataError, ConfigError), match=message):
        load_dataset(DatasetConfig(path=str(path)))


def test_a_remote_folder_is_fetched_once_and_its_checksums_are_verified(
    tmp_path: Path, classification: Path
) -> None:
    url = f"file://{classification}"
    local = load_dataset(DatasetConfig(path=str(classification)))
    fetched = load_dataset(DatasetConfig(path=url), url, tmp_path)
    assert fetched.test.data_digest == local.test.data_digest
    assert fetched.name == local.name
    wrong = DatasetConfig(path=url, checksums={"test/0.tar": "0" * 64})
    with pytest.raises(DataError, match=r"0\.tar has the sha256"):
        load_dataset(wrong, url, tmp_path)
    with pytest.raises(DataError, match="is not there"):
        load_dataset(DatasetConfig(path=url), f"{url}-gone", tmp_path)


def test_shipped_suites_load_and_absent_datasets_are_reported(tmp_path: Path) -> None:
    names = sorted(path.stem for path in (SHIPPED / "evaluation").glob("*.yaml"))
    assert {"vtab", "imagenet_shifts", "retrieval", "datacomp_38", "fewshot_11", "demo"} <= set(
        names
    )
    for name in names:
        config = load_config(f"evaluation/{name}", EvaluateConfig, [f"root={tmp_path}"])
        assert f"evaluation/{name}" in list_all()
        if name != "demo":
            found, absent = load_datasets(config)
            assert not found
            assert len(absent) == len(config.datasets)
            assert f"0 of {len(absent)} datasets are there" in list_suite(config)


def test_an_average_is_given_over_the_whole_suite_or_not_at_all(
    tmp_path: Path, classification: Path, retrieval_data: Path, open_clip_folder: Path, capsys
) -> None:
    tree = {
        "name": "suite",
        "absent": "report",
        "average": "mean_of_two",
        "num_workers": 0,
        "num_bootstrap": 100,
        "output": str(tmp_path / "out"),
        "cache": str(tmp_path / "cache"),
        "datasets": [
            {"path": str(classification), "title": "Colours", "random_score": 0.99},
            {"path": str(retrieval_data), "task": "retrieval"},
        ],
    }
    config = validate(tree, EvaluateConfig, label="test")
    checkpoint = str(open_clip_folder)
    rows = evaluate(config, [checkpoint])
    by_metric = {row.metric: row.value for row in rows}
    mean = (by_metric["top1"] + by_metric["mean_recall@1"]) / 2
    assert by_metric["mean_of_two"] == pytest.approx(mean)
    absent = [Absent(config.datasets[0], "gone")]
    assert average_row(config, checkpoint, rows, absent) is None
    table = [PublishedRow("any", "tag", {"Colours": by_metric["top1"] + 0.2})]
    first, second = lint(rows, config, table, model="any/tag")
    assert first.note.startswith("below the random score")
    assert not second.is_bad
    last = lint_table([first, second]).splitlines()[-1]
    assert last == "0 as published, 1 without a published number, 1 to look at"
    gone = validate(
        tree | {"root": str(tmp_path), "datasets": [*tree["datasets"], {"path": "gone"}]},
        EvaluateConfig,
        label="test",
    )
    evaluate(gone, [checkpoint])
    assert "absent: gone: no images at" in capsys.readouterr().err
    unsaid = [tree["datasets"][0], {"path": str(retrieval_data)}]  # its task is in its folder
    evaluate(validate(tree | {"datasets": unsaid}, EvaluateConfig, label="test"), [checkpoint])
    said = capsys.readouterr().err
    assert f"no mean_of_two for {checkpoint}: there is no captions zero_shot/top1" in said


def test_two_checkpoints_are_compared_on_the_same_resamples(
    tmp_path: Path, open_clip_folder: Path, run_folder: Path
) -> None:
    data = write_classification(tmp_path / "data", num_images=60)
    both = [str(open_clip_folder), str(run_folder)]
    config = make_config(tmp_path / "out", data, predictions=True)
    evaluate(config, both)
    predictions = read_predictions(tmp_path / "out")
    found = {one.metric: one for one in compare(predictions, *both)}
    values = {
        (row.checkpoint, row.metric): row.value
        for row in read_results(tmp_path / "out" / "results.jsonl")
    }
    for metric, one in found.items():
        expected = values[both[1], metric] - values[both[0], metric]
        assert one.difference == pytest.approx(expected, abs=1e-6)
        assert one.interval[0] - 1e-6 <= one.difference <= one.interval[1] + 1e-6
    same = compare(predictions, both[0], both[0])
    assert all(one.difference == 0 and one.p == 1 for one in same)


def test_the_linter_has_nothing_to_say_of_no_results(tmp_path: Path, capsys) -> None:
    table = tmp_path / "table.csv"
    table.write_text("name,pretrained,ImageNet 1k\nViT-B-32,openai,0.63\n")
    line = ["evaluate", "--lint", str(table), "evaluation/datacomp_38", f"output={tmp_path}"]
    assert cli.main(line) == 2
    assert "there are no results in" in capsys.readouterr().err


@pytest.mark.skipif(not PUBLISHED.is_file(), reason="no ../shared/golden/published beside the tree")
def test_the_published_averages_are_ours_over_the_published_rows() -> None:
    config = load_config("evaluation/datacomp_38", EvaluateConfig)
    table = read_published_table(PUBLISHED)
    assert published_average(table[0], config) == pytest.approx(0.7079, abs=5e-5)
    ours = np.asarray([published_average(row, config) for row in table])
    theirs = np.asarray([row.scores[PUBLISHED_AVERAGE] for row in table])
    assert np.abs(ours - theirs).max() < 1e-4


def test_a_table_without_its_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["a", "b"], ["1", "2"]])
    with pytest.raises(DataError, match="columns name, pretrained"):
        read_published_table(path)


def test_labels_may_stand_in_several_places_and_others_are_left_out(
    pool: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = TEXT.replace("labels: cls", 'labels: ["json:missing", "json:kind"]')
    text = text.replace("[red, green, blue]", "[b]").replace("pool.tar", "po*.tar")
    text = text.replace("{red: [a, b], green: [c], blue: [d, e, f]}", "{b: [x]}")
    path = write(pool, text + "other_labels: leave_out\n")
    dataset = load_dataset(DatasetConfig(path=str(path)))
    kinds = dataset.test.groups["kind"]
    assert kinds.names == ("b",)
    assert not dataset.test.labels().any()
    assert "have a label that is none of the classes; left out" in capsys.readouterr().err
    config = make_config(pool / "out", path, pool / "gone.yaml", absent="report")
    (pool / "gone.yaml").write_text("images: [gone.tar]")
    found, absent = load_datasets(config)
    assert [one.config.label for one in absent] == ["gone"]
    assert len(found) == 1
