"""What DataComp's list needs beyond classes and captions: cues, groups in folders, main metrics."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import png, write_classification, write_tar

from configs.load import load_config
from evaluation.average import main_metric
from evaluation.config import DatasetConfig, EvaluateConfig
from evaluation.datasets import load_dataset
from evaluation.methods.association import Association, cue_prompt, jaccard
from evaluation.methods.worst_group import WorstGroup
from evaluation.subject import Subject
from pretrain.model.geometries import Cosine


def test_an_association_dataset_counts_what_is_taken_and_belongs(tmp_path: Path) -> None:
    rows = []
    for i in range(11):
        (tmp_path / f"{i}.png").write_bytes(png(i, i % 6))
        cue, instance = ("Apple", "a") if i < 5 else ("house", "b")
        row = {"image": f"{i}.png", "cue": cue, "instance": instance, "belongs": int(i % 5 < 2)}
        rows.append(json.dumps(row))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    tree = {"task": "association", "images": ["rows.jsonl"], "captions": ["cue"]}
    tree |= {"labels": "belongs", "instances": "instance"}
    (tmp_path / "wino.yaml").write_text(json.dumps(tree))
    dataset = load_dataset(DatasetConfig(path=str(tmp_path / "wino.yaml")))
    assert dataset.test.instances == ("a",) * 5 + ("b",) * 6
    assert dataset.test.labels().tolist() == [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert [cue_prompt(cue) for cue in ("Apple", "house")] == ["An apple", "A house"]

    image_nD = torch.eye(11)
    text = {"An apple": image_nD[0] + image_nD[2], "A house": image_nD[5:8].sum(dim=0)}
    features = SimpleNamespace(
        identity=SimpleNamespace(similarity=Cosine()),
        images=lambda name, split, part: (image_nD, part),
        texts=lambda texts, what: torch.stack([text[t] for t in texts]),
    )
    (outcome,) = Association().run(Subject(features, dataset, {}))
    found = {m.name: m for m in outcome.metrics}
    # a: takes 0 and 2 of the right 0, 1 -> 1/3; b: takes 5, 6, 7 of the right 5, 6, 10 -> 2/4
    assert (
        found["jaccard"].value == found["jaccard_5_6"].value == pytest.approx((1 / 3 + 2 / 4) / 2)
    )
    assert "jaccard_10_12" not in found


def test_tied_images_share_the_jaccard_index_of_all_orders() -> None:
    score, belongs = np.array([3.0, 1, 1, 1, 0]), np.array([1, 1, 0, 0, 1], dtype=bool)
    # 0 is taken, and two of 1, 2, 3: with 1 (2 of 3 ways) h = 2 of k = 3, without it h = 1
    assert jaccard(score, belongs) == pytest.approx(2 / 3 * 2 / 4 + 1 / 3 * 1 / 5)
    assert jaccard(np.zeros(5), np.array([1, 0, 0, 0, 0], dtype=bool)) == pytest.approx(1 / 5)


def test_a_folder_takes_its_groups_from_members_of_its_tars(tmp_path: Path) -> None:
    folder = write_classification(tmp_path / "fmow")
    members = []
    for i in range(6):
        buffer = io.BytesIO()
        np.save(buffer, np.array([i % 3, 2016 + i], dtype=np.float64))
        members += [
            (f"{i}.png", png(i, i)),
            (f"{i}.cls", b"%d" % i),
            (f"{i}.npy", buffer.getvalue()),
        ]
    write_tar(folder / "test" / "0.tar", members)
    (folder / "test" / "nshards.txt").write_text("1")
    dataset = load_dataset(DatasetConfig(path=str(folder), groups={"region": "npy:0"}))
    group = dataset.test.groups["region"]
    assert group.names == ("0", "1", "2")
    assert group.index_n.tolist() == [0, 1, 2, 0, 1, 2]
    assert WorstGroup("region", False, 1, ()).lacks(dataset) is None


def test_every_task_of_datacomps_list_has_its_main_metric() -> None:
    """Of the metrics that the methods named for it give: none is left to be built."""
    config = load_config("evaluation/datacomp_38", EvaluateConfig)
    assert len(config.datasets) == 38
    given = {
        "zero_shot": {"top1", "mean_per_class_recall", "f1_macro"},
        "retrieval": {"mean_recall@1"},
        "association": {"jaccard_10_12"},
        "worst_group": {"worst_group"},
    }
    for section in config.datasets:
        method, metric = main_metric(section).split("/")
        assert metric in given[method], section.label
        named = [m.name for m in config.method_sections(section, section.task)]
        assert method in named, section.label
