"""The whole run on made data: rows, files, tables, and what must not change them."""

from __future__ import annotations

import base64
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_classification
from PIL import Image

from configs.errors import CheckpointError, ConfigError, DataError, PairmillError, UsageError
from configs.load import digest, load_config, validate
from evaluation.cache import FeatureCache
from evaluation.config import DatasetConfig, EvaluateConfig
from evaluation.datasets import load_dataset
from evaluation.features import EncodeOptions, Features
from evaluation.identity import identify
from evaluation.result import BASELINE, Result, read_results, table
from evaluation.suite import dry_run, evaluate

import open_clip  # isort: skip

REPOSITORY = Path(__file__).resolve().parents[2]


def make_config(folder: Path, *datasets: Path, **keys: object) -> EvaluateConfig:
    tree = {
        "name": "test",
        "datasets": [{"path": str(path)} for path in datasets],
        "num_workers": 0,
        "batch_size": 8,
        "num_bootstrap": 100,
        "output": str(folder),
        "cache": str(folder / "cache"),
    }
    return validate(tree | keys, EvaluateConfig, label="test")


def values(rows: list[Result]) -> dict[tuple[str, str, str], tuple[float, tuple[float, float]]]:
    return {(row.checkpoint, row.dataset, row.metric): (row.value, row.interval) for row in rows}


def test_rows_say_everything_that_the_contract_names(
    tmp_path: Path, classification: Path, retrieval_data: Path, reference: Path, run_folder: Path
) -> None:
    baseline = {"reference": str(reference)}
    config = make_config(tmp_path, classification, retrieval_data, baseline=baseline)
    rows = evaluate(config, [str(run_folder)])
    assert len(rows) == 2 * (3 + 6) + 1 + 3  # F1 and the mean recalls: of the model alone
    assert read_results(tmp_path / "results.jsonl") == rows
    names = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert list(names) == list(Result.model_fields)
    own = [row for row in rows if row.checkpoint == str(run_folder)]
    assert {row.samples_seen for row in own} == {1280}
    assert {row.config_digest for row in rows} == {digest(config)}
    by_metric = {(row.checkpoint, row.metric): row for row in rows}
    assert by_metric[BASELINE, "top1"].value > 2 / 6
    for row in rows:
        assert (row.interval is None) == row.metric.startswith("mean_recall")
        if row.interval is not None:
            assert 0 <= row.interval[0] <= row.interval[1] <= 1
        assert (
            row.n == {"t2i": 24, "i2t": 12, "mea": 36}.get(row.metric[:3], 18)
            or row.method == "zero_shot"
        )
        assert (row.prompt_digest is None) == (row.method == "retrieval")
    text = table(rows)
    assert text.startswith(f"{run_folder}\n")
    assert "mean_per_class_recall" in text
    assert "16.7" in text  # the chance level of six classes
    assert BASELINE not in text  # it stands beside, in its own column


def test_the_accuracy_is_that_of_open_clip_used_by_hand(
    tmp_path: Path, classification: Path, open_clip_folder: Path
) -> None:
    rows = evaluate(make_config(tmp_path, classification), [str(open_clip_folder)])
    name = f"local-dir:{open_clip_folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    from conftest import COLORS, png

    templates = [lambda c: f"a {c} picture", lambda c: f"the colour {c}"]
    classifier = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer(name), COLORS, templates
    )
    numbers = [*range(0, 18, 2), *range(1, 18, 2)]
    pictures = [Image.open(io.BytesIO(png(i, i % 6))).convert("RGB") for i in numbers]
    with torch.no_grad():
        image_nD = model.encode_image(
            torch.stack([preprocess(p) for p in pictures]), normalize=True
        )
    top5 = (image_nD @ classifier).topk(5).indices
    right = top5 == torch.tensor([[i % 6] for i in numbers])
    found = {row.metric: row.value for row in rows}
    assert found["top1"] == pytest.approx(float(right[:, 0].float().mean()), abs=1e-6)
    assert found["top5"] == pytest.approx(float(right.any(1).float().mean()), abs=1e-6)


def test_batch_size_workers_and_company_change_no_result(
    tmp_path: Path,
    classification: Path,
    retrieval_data: Path,
    open_clip_folder: Path,
    run_folder: Path,
) -> None:
    both = [str(open_clip_folder), str(run_folder)]
    config = make_config(tmp_path / "a", classification, retrieval_data)
    whole = evaluate(config, both)
    other = make_config(tmp_path / "b", retrieval_data, classification, num_workers=2, batch_size=5)
    assert values(evaluate(other, both[::-1])) == values(whole)
    alone = evaluate(make_config(tmp_path / "c", retrieval_data), both[1:])
    assert values(alone).items() <= values(whole).items()


def test_evaluating_again_gives_the_same_and_keeps_the_rows_of_others(
    tmp_path: Path, classification: Path, open_clip_folder: Path, run_folder: Path
) -> None:
    config = make_config(tmp_path, classification)
    first = evaluate(config, [str(open_clip_folder)])
    second = evaluate(config, [str(run_folder)])
    again = evaluate(config, [str(open_clip_folder)])

    def plain(rows: list[Result]) -> list[dict[str, object]]:
        return [row.model_dump(exclude={"seconds"}) for row in rows]

    assert plain(again) == plain(first)
    kept = read_results(tmp_path / "results.jsonl")
    assert sorted(map(str, plain(kept))) == sorted(map(str, plain([*first, *second])))
    shown = json.loads((tmp_path / "examples.json").read_text())
    assert sorted(s["checkpoint"] for s in shown) == sorted(
        map(str, (open_clip_folder, run_folder))
    )


def test_examples_hold_small_pictures_and_mark_what_is_right(
    tmp_path: Path, retrieval_data: Path, open_clip_folder: Path
) -> None:
    evaluate(make_config(tmp_path, retrieval_data), [str(open_clip_folder)])
    (shown,) = json.loads((tmp_path / "examples.json").read_text())
    assert (shown["dataset"], shown["task"]) == ("captions", "retrieval")
    assert len(shown["text_to_image"]) == len(shown["image_to_text"]) == 12
    for query in shown["text_to_image"]:
        scores = [image["score"] for image in query["images"]]
        assert len(scores) == 5
        assert scores == sorted(scores, reverse=True)
        picture = Image.open(io.BytesIO(base64.b64decode(query["images"][0]["png"])))
        assert max(picture.size) <= 64
        number = query["text"].split()[1]
        for image in query["images"]:
            if query["text"].startswith(("picture", "number")):
                assert image["right"] == (int(image["key"]) == int(number))
    for query in shown["image_to_text"]:
        for text in query["texts"]:
            # "one more" is a caption of several pictures: right only where it is this one's own.
            assert not text["right"] or text["text"] in query["own_texts"]


def test_an_undecodable_image_stops_the_run_or_is_left_out_when_allowed(
    tmp_path: Path, open_clip_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_classification(tmp_path / "data")
    tar = folder / "test" / "0.tar"
    data = tar.read_bytes()
    start = data.index(b"\x89PNG", 5000)
    tar.write_bytes(data[:start] + b"\0" * 8 + data[start + 8 :])
    config = make_config(tmp_path / "out", folder)
    with pytest.raises(DataError, match=r"1 of 18 images cannot be decoded: 00\d+ in 0\.tar"):
        evaluate(config, [str(open_clip_folder)])
    assert not (tmp_path / "out" / "results.jsonl").exists()
    allowed = make_config(tmp_path / "out", folder, max_undecodable=1)
    rows = evaluate(allowed, [str(open_clip_folder)])
    assert {row.n for row in rows} == {17}
    assert "1 of 18 images cannot be decoded" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_done_and_finds_what_is_missing(
    tmp_path: Path, classification: Path, retrieval_data: Path, reference: Path, run_folder: Path
) -> None:
    baseline = {"reference": str(reference)}
    config = make_config(tmp_path / "out", classification, retrieval_data, baseline=baseline)
    text = dry_run(config, [str(run_folder)])
    assert "colours (zero_shot): 18 images, 6 classes x 2 templates = 12 prompts" in text
    assert "captions (retrieval): 12 images, 24 captions" in text
    assert "1 checkpoint x 30 images = 30 images to encode" in text
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="there is no dataset folder"):
        dry_run(make_config(tmp_path, tmp_path / "nothing"), [str(run_folder)])
    with pytest.raises(UsageError, match="no checkpoint to evaluate"):
        dry_run(config, [])
    with pytest.raises(UsageError, match="expected each one once"):
        dry_run(config, [str(run_folder)] * 2)


def test_methods_that_cannot_run_are_said_before_anything_is_encoded(
    tmp_path: Path, classification: Path, retrieval_data: Path, run_folder: Path
) -> None:
    methods = [{"name": "calibration"}, {"name": "ood", "sets": ["gone"]}]
    gone = {"path": str(tmp_path / "gone")}
    here = [{"path": str(classification)}, {"path": str(retrieval_data)}]
    keys = {"methods": methods, "absent": "report"}
    config = make_config(tmp_path / "out", **keys, datasets=[*here, gone])
    text = dry_run(config, [str(run_folder)])
    assert "= 12 prompts; methods: calibration\n" in text
    assert "24 captions; methods: none\n" in text
    assert "left out: captions: calibration needs classes and labels" in text
    assert "left out: colours: ood needs the dataset gone, which is absent" in text
    amu = [{"name": "few_shot", "learners": [{"name": "amu_tuning"}]}]
    wrong = [
        (make_config(tmp_path / "out", **keys, datasets=here), "which is not in this run"),
        (make_config(tmp_path / "out", classification, methods=amu), "set `auxiliary`"),
        (make_config(tmp_path / "out", absent="report", datasets=[gone]), "none of its 1 datasets"),
    ]
    for config, message in wrong:
        for run in (dry_run, evaluate):
            with pytest.raises(PairmillError, match=message):
                run(config, [str(run_folder)])
    assert not (tmp_path / "out").exists()


def test_a_results_file_that_is_none_is_never_overwritten(
    tmp_path: Path, classification: Path, open_clip_folder: Path
) -> None:
    (tmp_path / "results.jsonl").write_text('{"checkpoint": "mine"}\n')
    with pytest.raises(DataError, match="line 1 is not a result"):
        evaluate(make_config(tmp_path, classification), [str(open_clip_folder)])
    assert (tmp_path / "results.jsonl").read_text() == '{"checkpoint": "mine"}\n'
    (tmp_path / "results.jsonl").unlink()
    (tmp_path / "examples.json").write_text("[{}]")
    with pytest.raises(DataError, match="not a list of retrieval examples"):
        evaluate(make_config(tmp_path, classification), [str(open_clip_folder)])


def test_a_bad_last_checkpoint_does_not_lose_the_earlier_ones(
    tmp_path: Path, classification: Path, open_clip_folder: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(open_clip_folder, bad)
    (bad / "open_clip_model.safetensors").write_bytes(b"damaged")
    config = make_config(tmp_path / "out", classification)
    with pytest.raises(CheckpointError, match="could not load"):
        evaluate(config, [str(open_clip_folder), str(bad)])
    kept = read_results(tmp_path / "out" / "results.jsonl")
    assert {row.checkpoint for row in kept} == {str(open_clip_folder)}
    assert len(json.loads((tmp_path / "out" / "examples.json").read_text())) == 1
    assert values(kept) == values(evaluate(config, [str(open_clip_folder)]))


def test_an_output_that_cannot_be_made_is_refused_before_the_work(
    tmp_path: Path, classification: Path, open_clip_folder: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    config = make_config(tmp_path / "file" / "out", classification)
    for run in (dry_run, evaluate):
        with pytest.raises(UsageError, match=r"file.out cannot be made or written to"):
            run(config, [str(open_clip_folder)])


def test_names_may_hold_a_line_separator_but_no_lone_surrogate(
    tmp_path: Path, classification: Path, open_clip_folder: Path
) -> None:
    odd = shutil.copytree(open_clip_folder, tmp_path / "a\u2028b")
    rows = evaluate(make_config(tmp_path / "out", classification), [str(odd)])
    assert read_results(tmp_path / "out" / "results.jsonl") == rows
    with pytest.raises(UsageError, match="expected a name in UTF-8"):
        evaluate(make_config(tmp_path / "out", classification), ["a\udcffb"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_a_worker_process_arrives_as_it_was_raised(
    tmp_path: Path, open_clip_folder: Path, num_workers: int
) -> None:
    dataset = load_dataset(DatasetConfig(path=str(write_classification(tmp_path / "data"))))
    digest = dataset.test.data_digest
    tar = tmp_path / "data" / "test" / "1.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    part = replace(dataset.test, digest_of=lambda: digest)
    options = EncodeOptions(num_workers=num_workers)
    features = Features(identify(str(open_clip_folder)), FeatureCache(tmp_path / "cache"), options)
    with pytest.raises(DataError, match="became shorter") as caught:
        features.images("data", "test", part)
    assert "Traceback" not in str(caught.value)


def test_the_shipped_config_loads_and_two_datasets_of_one_name_are_refused() -> None:
    config = load_config(REPOSITORY / "configs" / "demo" / "evaluate.yaml", EvaluateConfig)
    assert [dataset.label for dataset in config.datasets] == [
        "serif",
        "serif-letters-digits",
        "unseen",
    ]
    assert config.baseline is not None
    with pytest.raises(ConfigError, match="two datasets are called data"):
        make_config(Path("out"), Path("a/data"), Path("b/data"))


def test_a_mean_of_hits_is_the_mean_of_the_units_that_it_reports(
    tmp_path: Path, classification: Path, open_clip_folder: Path
) -> None:
    copy = shutil.copytree(classification, tmp_path / "copy")
    config = make_config(tmp_path / "out", classification, copy)
    rows = evaluate(config, [str(open_clip_folder)])
    by_dataset = {
        name: [(row.value, row.data_digest) for row in rows if row.dataset == name]
        for name in ("colours", "copy")
    }
    assert by_dataset["colours"] == by_dataset["copy"]  # same bytes: same digest, same results
    top1 = next(row for row in rows if row.metric == "top1")
    assert top1.value * top1.n == pytest.approx(np.round(top1.value * top1.n))
