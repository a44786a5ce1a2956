"""What is judged while training is what `pairmill evaluate` says of the same weights."""

import json

import numpy as np
import pytest
import torch

from configs.errors import DataError
from configs.load import validate
from evaluation.config import EvaluateConfig
from evaluation.in_training import InTraining
from evaluation.suite import evaluate
from pretrain.checkpoint import model_folder
from pretrain.model.clip import load_clip
from pretrain.model.similarity import load_similarity
from pretrain.model.tokenizer import Tokenizer
from pretrain.model.view import ModelView
from pretrain.objectives.group import Solo
from tests.evaluation.conftest import write_classification, write_retrieval

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def test_zero_shot_and_retrieval_while_training_are_those_of_the_suite(
    run_folder, tmp_path, capsys
):
    paths = [write_classification(tmp_path / "colors"), write_retrieval(tmp_path / "pictures")]
    config = validate(
        {
            "name": "both", "datasets": [{"path": str(path)} for path in paths], "batch_size": 5,
            "num_workers": 0, "cache": str(tmp_path / "cache"), "output": str(tmp_path / "results"),
        },
        EvaluateConfig,
        label="test",
    )  # fmt: skip
    rows = evaluate(config, [str(run_folder)])
    expected = {f"{row.dataset}/{row.metric}": row.value for row in rows}
    folder = model_folder(run_folder)
    clip = load_clip(folder).eval()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))

    def encode(image_b3HW, token_bL):
        with torch.no_grad():
            pixels = (image_b3HW.float() / 255 - mean) / std
            return clip.encode_image(pixels), clip.encode_text(token_bL)

    view = ModelView(encode, 16, Tokenizer.load(folder), load_similarity(folder), Solo(), 320)
    absent = config.datasets[0].model_copy(update={"path": str(tmp_path / "gone"), "name": "gone"})
    reported = config.model_copy(update={"absent": "report"})
    with pytest.raises(DataError, match="none of its 1 datasets is there"):
        InTraining(reported.model_copy(update={"datasets": (absent,)}))
    judge = InTraining(
        reported.model_copy(update={"datasets": (*config.datasets, absent)}), tmp_path / "probe"
    )
    assert "absent: gone: no images at" in capsys.readouterr().err
    found = judge(view)
    assert {"colors/top1", "pictures/t2i_recall@1", "pictures/i2t_recall@5"} <= found.keys()
    assert found.keys() <= expected.keys()
    assert found == {name: pytest.approx(expected[name], abs=1e-9) for name in found}
    assert judge(view) == found  # from the pictures that were kept
    for dataset in ("colors", "pictures"):
        images = json.loads((tmp_path / f"probe/{dataset}/images.json").read_text())
        probe_pD = np.load(tmp_path / f"probe/{dataset}/samples-000000000320.npy")
        assert len(probe_pD) == len(images["keys"]) == len(images["labels"]) > 1
        assert np.allclose(np.linalg.norm(probe_pD, axis=1), 1)
        assert all(images["labels"])
