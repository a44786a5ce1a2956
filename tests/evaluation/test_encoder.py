"""Checkpoints as encoders: ours, foreign folders, names; what is said of those that are none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from conftest import SMALL_CONFIG
from PIL import Image
from safetensors.torch import load_file, save_file

from configs.errors import CheckpointError, UsageError
from evaluation.encoder import Encoder, load_encoder
from evaluation.identity import choose_device, find_model
from evaluation.tar import file_sha256

import open_clip  # isort: skip

TEXTS = ["a red picture", "the blue one"]


def test_a_foreign_folder_encodes_as_open_clip_itself_does(open_clip_folder: Path) -> None:
    encoder = load_encoder(str(open_clip_folder))
    name = f"local-dir:{open_clip_folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))
    pixels = preprocess(picture)[None]
    assert torch.equal(encoder.transform(picture)[None], pixels)
    model.eval()
    with torch.no_grad():
        assert torch.equal(encoder.encode_images(pixels), model.encode_image(pixels))
        expected = model.encode_text(open_clip.get_tokenizer(name)(TEXTS))
    torch.testing.assert_close(encoder.encode_texts(TEXTS), expected)
    assert encoder.digest == file_sha256(open_clip_folder / "open_clip_model.safetensors")
    assert encoder.samples_seen is None
    assert not any(module.training for module in encoder.model.modules())


@pytest.mark.parametrize(
    ("text_keys", "is_shortened"),
    [({}, True), ({"no_causal_mask": True}, False), ({"pool_type": "last"}, False)],
    ids=str,
)
def test_only_the_positions_that_a_text_depends_on_are_encoded(
    text_keys: dict, is_shortened: bool
) -> None:
    torch.manual_seed(0)
    model = open_clip.CLIP(**SMALL_CONFIG | {"text_cfg": SMALL_CONFIG["text_cfg"] | text_keys})
    token_bL = open_clip.tokenize([*TEXTS, "one"], context_length=8)
    widths = []
    model.transformer.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1]))
    encoder = Encoder("c", "d", None, None, None, model.eval(), None, torch.device("cpu"), "fp32")
    assert encoder.text_lengths(token_bL).tolist() == ([5, 5, 3] if is_shortened else [8, 8, 8])
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_tokens(token_bL), model.encode_text(token_bL))
    assert widths == [5 if is_shortened else 8, 8]


def test_a_run_folder_means_its_latest_checkpoint_with_its_own_tokenizer(run_folder: Path) -> None:
    checkpoint = run_folder / "checkpoints" / "samples-000000001280"
    encoders = [load_encoder(str(path)) for path in (run_folder, checkpoint, checkpoint / "model")]
    features = [encoder.encode_texts(TEXTS) for encoder in encoders]
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])
    assert [encoder.samples_seen for encoder in encoders] == [1280] * 3
    tokens = encoders[0].tokenizer(["a red picture"])
    assert tokens.shape == (1, 8)
    assert int(tokens.max()) < 64


def test_bf16_is_near_fp32_and_comes_back_as_float32(run_folder: Path) -> None:
    exact = load_encoder(str(run_folder)).encode_texts(TEXTS)
    rounded = load_encoder(str(run_folder), precision="bf16").encode_texts(TEXTS)
    assert rounded.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact, rounded).min() > 0.99


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("ViT-B-32", "no tag: its weights would be random"),
        ("ViT-B/32", "ViT-B-32: got no tag"),
        ("ViT-B-32/opnai", "the tag 'opnai'. Expected ViT-B-32/TAG with one of: openai"),
        ("ViT-B-33/openai", "neither a path here nor an open_clip model, did you mean 'ViT-B-32'"),
        ("runs/nothing/here", "there is no checkpoint 'runs/nothing/here'"),
        ("local-dir:/nowhere", "there is no folder /nowhere"),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_the_way_out(checkpoint: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_model(checkpoint)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_encoder(str(tmp_path))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="but no weights"):
        load_encoder(str(tmp_path))
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="open_clip could not load"):
        load_encoder(str(tmp_path))


def test_without_network_a_pretrained_tag_fails_with_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for checkpoint in ("ViT-B-32/openai", "hf-hub:nobody/nothing"):
        with pytest.raises(CheckpointError, match=r"could not load '(ViT|hf).*check the network"):
            load_encoder(checkpoint)


def test_a_hub_model_is_read_from_the_download_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, open_clip_folder: Path
) -> None:
    repository = tmp_path / "models--somebody--small"
    shutil.copytree(open_clip_folder, repository / "snapshots" / "0a1b")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0a1b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub, local = load_encoder("hf-hub:somebody/small"), load_encoder(str(open_clip_folder))
    assert torch.equal(hub.encode_texts(TEXTS), local.encode_texts(TEXTS))
    assert hub.digest == local.digest


def test_weights_that_are_not_finite_are_refused(open_clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(open_clip_folder, tmp_path / "broken")
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] = torch.nan
    save_file(weights, folder / "open_clip_model.safetensors")
    encoder = load_encoder(str(folder))
    with pytest.raises(CheckpointError, match="features that are not finite for an image"):
        encoder.encode_images(torch.zeros(1, 3, 16, 16))


def test_weights_that_changed_after_they_were_written_are_refused(
    run_folder: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(run_folder, tmp_path / "run")
    path = next(run.rglob("open_clip_model.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"open_clip_model\.safetensors has changed"):
        load_encoder(str(run))


def test_a_similarity_that_we_do_not_know_is_named(open_clip_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(open_clip_folder, tmp_path / "hyperbolic")
    path = folder / "open_clip_config.json"
    description = json.loads(path.read_text())
    description["pairmill"] = {"similarity": {"name": "cosin"}}
    path.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="did you mean 'cosine'"):
        load_encoder(str(folder))


@pytest.mark.parametrize("section", [{"similarity": {}}, {"similarity": 7}, [], None])
def test_a_similarity_that_makes_no_sense_is_a_checkpoint_error(
    open_clip_folder: Path, tmp_path: Path, section: object
) -> None:
    folder = shutil.copytree(open_clip_folder, tmp_path / "odd")
    path = folder / "open_clip_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pairmill": section}))
    with pytest.raises(CheckpointError, match=r"pairmill\.similarity cannot be used"):
        load_encoder(str(folder))


def test_an_unknown_device_is_refused() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="expected auto, cpu, cuda"):
        choose_device("abacus")
    if not torch.cuda.is_available():
        assert choose_device("auto").type == "cpu"
        with pytest.raises(UsageError, match="no CUDA device"):
            choose_device("cuda")
