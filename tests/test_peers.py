"""The others themselves, as whole programs: open_clip_train on our tars, open_clip's weights here,
CLIP_benchmark on our export. CI requires them (.ci/run); a plain `make test` leaves them out.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pretrain.model.clip import open_clip
from tests import warm
from tests.evaluation.conftest import write_classification
from tests.pretrain.conftest import TINY_MODEL, make_dataset

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(
        os.environ.get("PAIRMILL_TEST_PEERS") != "required",
        reason="a minute of CPU, which CI spends: PAIRMILL_TEST_PEERS=required runs them here",
    ),
]
ROOT = Path(__file__).resolve().parents[1]
# A folder of its own for it: tools/benchmark/clip_benchmark.txt says how to fill it.
CLIP_BENCHMARK = Path(os.environ.get("PAIRMILL_CLIP_BENCHMARK", "PAIRMILL_CLIP_BENCHMARK"))


def run(*words: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def pairmill(*words: str, cwd: Path) -> None:
    done = warm.run("tools.cli", list(words), cwd=cwd, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def curated(tmp_path_factory) -> Path:
    """A dataset that `pairmill curate` wrote: three shards of 32 samples."""
    tmp_path = tmp_path_factory.mktemp("curated")
    make_dataset(tmp_path / "raw", [50, 46])
    (tmp_path / "curate.yaml").write_text(
        "name: tiny\noutput: dataset\nsources: [{name: raw, shards: raw}]\n"
        "rules: [{name: caption_length, min_words: 2}]\nwrite: {samples_per_shard: 32}\n"
    )
    pairmill("curate", "curate.yaml", cwd=tmp_path)
    assert len(list((tmp_path / "dataset").glob("*.tar"))) == 3
    return tmp_path / "dataset"


def foreign_folder(folder: Path, *, quick_gelu: bool) -> Path:
    """Write an open_clip folder as open_clip does, random weights; OpenAI's have quick_gelu."""
    torch.manual_seed(1)
    config = {**TINY_MODEL, "quick_gelu": quick_gelu}
    config["text_cfg"] = {**config["text_cfg"], "vocab_size": 49_408}
    model = open_clip.CLIP(**config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder.mkdir()
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "model.json").write_text(json.dumps(config))
    return folder


def test_open_clip_train_trains_on_our_tars(curated, tmp_path):
    config = {**TINY_MODEL, "text_cfg": {**TINY_MODEL["text_cfg"], "vocab_size": 49_408}}
    (tmp_path / "tiny-peer.json").write_text(json.dumps(config))
    words = [
        *("--train-data", f"{curated}/{{00000..00002}}.tar", "--dataset-type", "webdataset"),
        *("--model", "tiny-peer", "--train-num-samples", "96", "--batch-size", "16"),
        *("--epochs", "1", "--workers", "1", "--warmup", "1", "--device", "cpu"),
        *("--logs", str(tmp_path / "logs"), "--name", "peer", "--log-every-n-steps", "1"),
    ]
    code = (
        "from pretrain.model.torchvision_ops import ensure_torchvision as ready; ready()\n"
        "import open_clip; from pathlib import Path; from functools import partial\n"
        # Its tar reader does not know the end marks that webdataset 1.0 puts between shards.
        "from open_clip_train import data; expander = data.tar_file_expander\n"
        "data.tar_file_expander = partial(getattr(expander, 'func', expander), eof_value=None)\n"
        f"open_clip.add_model_config(Path({str(tmp_path / 'tiny-peer.json')!r}))\n"
        f"from open_clip_train.main import main; main({words!r})"
    )
    said = run("-c", code, cwd=tmp_path)
    assert "Train Epoch: 0 [96/96" in said or "[96/96 (100%)]" in said, said[-2000:]
    assert (tmp_path / "logs/peer/checkpoints/epoch_1.pt").is_file()


def test_open_clips_and_openais_weights_go_on_training_and_are_evaluated_here(curated, tmp_path):
    for name, quick_gelu in (("theirs", False), ("openais", True)):
        foreign = foreign_folder(tmp_path / name, quick_gelu=quick_gelu)
        (tmp_path / f"{name}.yaml").write_text(
            json.dumps(
                {
                    "name": name, "output": f"{name}-run",
                    "data": {"manifest": str(curated), "num_workers": 0},
                    "model": f"{name}/model.json", "tokenizer": {"name": "clip"},
                    "towers": {"image": {"initial": name}, "text": {"initial": name}},
                    "objective": {"name": "clip"}, "optimizer": {"learning_rate": 1e-9},
                    "engine": {"num_threads": 1}, "global_batch_size": 32, "samples": 64,
                }
            )
        )  # fmt: skip
        pairmill("pretrain", f"{name}.yaml", cwd=tmp_path)
        run = tmp_path / f"{name}-run/checkpoints"
        latest = run / (run / "latest").read_text().strip()
        before = load_file(foreign / "open_clip_model.safetensors")
        after = load_file(latest / "model/open_clip_model.safetensors")
        assert set(after) - set(before) <= {"logit_bias"}
        for tensor in set(before) - {"logit_scale"}:  # the run's own
            torch.testing.assert_close(after[tensor], before[tensor], atol=1e-6, rtol=0)
    data = write_classification(tmp_path / "pets")
    suite = {"name": "s", "datasets": [{"path": str(data)}], "num_workers": 0, "num_bootstrap": 100}
    suite |= {"output": "results", "cache": "cache"}
    (tmp_path / "suite.yaml").write_text(json.dumps(suite))
    names = ["theirs", "theirs-run", "openais", "openais-run"]
    pairmill("evaluate", *names, "suite.yaml", cwd=tmp_path)
    rows = [json.loads(x) for x in (tmp_path / "results/results.jsonl").read_text().splitlines()]
    top1 = {row["checkpoint"]: row["value"] for row in rows if row["metric"] == "top1"}
    assert sorted(top1) == sorted(names)
    assert top1["theirs"] == top1["theirs-run"]
    assert top1["openais"] == top1["openais-run"]


def test_clip_benchmark_reads_our_export_and_gives_our_numbers(tmp_path):
    if not (CLIP_BENCHMARK / "clip_benchmark").is_dir():
        pytest.fail(
            f"{CLIP_BENCHMARK} holds no CLIP_benchmark: fill a folder as "
            "tools/benchmark/clip_benchmark.txt says, and name it by PAIRMILL_CLIP_BENCHMARK"
        )
    from tools.benchmark.clip_benchmark_peer import make_folders, ours, theirs
    from tools.benchmark.evaluation import make_model

    checkpoint = make_model(tmp_path / "model", "small")
    pairmill("export", str(checkpoint), "exported", cwd=tmp_path)
    folders = make_folders(tmp_path, 300)
    ours(tmp_path / "exported", folders, tmp_path)
    theirs(CLIP_BENCHMARK, tmp_path / "exported", folders, tmp_path)
    lines = (tmp_path / "ours/results.jsonl").read_text().splitlines()
    values = {(r["method"], r["metric"]): r["value"] for r in map(json.loads, lines)}
    found = {
        kind: json.loads((tmp_path / f"theirs-{kind}.json").read_text())["metrics"]
        for kind in ("classification", "retrieval")
    }
    pairs = [
        (("zero_shot", "top1"), found["classification"]["acc1"]),
        (("zero_shot", "mean_per_class_recall"), found["classification"]["mean_per_class_recall"]),
        (("retrieval", "t2i_recall@5"), found["retrieval"]["image_retrieval_recall@5"]),
        (("retrieval", "i2t_recall@5"), found["retrieval"]["text_retrieval_recall@5"]),
    ]
    for name, value in pairs:
        assert values[name] == pytest.approx(value, abs=1e-6), name
