"""Stages of one run on real DeepSpeed: sizes, lengths and objectives change, nothing is lost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import ConfigError
from pretrain.build import stage_model_config
from pretrain.checkpoint import read_record
from pretrain.model.clip import ClipModel, open_clip
from pretrain.model.positions import carry_weights
from tests.pretrain.conftest import TINY_MODEL, make_config, run_ranks
from tests.pretrain.test_train import equal, rows, weights, write_config

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]

# 3 steps at 8 px and 5 tokens, the rare ones, 3 at 16 px with half of the patches and 5 of 8 token
# positions, 2 with a smaller batch, all patches and another objective, 2 more with AdamW's moments
# kept. The image tower is locked in the first, the text tower in the last two.
STAGES = [
    {"name": "small", "samples": 48, "image_size": 8, "context_length": 5,
     "reduction": {"mask_ratio": 0.0}, "text_reduction": {"name": "frequency"},
     "towers": {"image": {"lock": True}}},
    {"name": "large", "samples": 48, "text_reduction": {"name": "random", "num_tokens": 5},
     "optimizer": {"learning_rate": 0.001, "schedule": {"name": "constant"}}},
    {"name": "tune", "samples": 16, "global_batch_size": 8, "reduction": {"mask_ratio": 0.0},
     "objective": {"name": "siglip"}, "augmentation": {"flip": True},
     "towers": {"text": {"lock": True}}},
    {"name": "on", "samples": 16, "global_batch_size": 8, "reduction": {"mask_ratio": 0.0},
     "objective": {"name": "siglip"}, "towers": {"text": {"lock": True}}, "keep_optimizer": True},
]  # fmt: skip
LAST = [3, 6, 8, 10]  # steps


def config_at(zero_stage: int, *arguments):
    changes = {
        "engine": {"zero_stage": zero_stage, "num_threads": 1}, "samples": None, "stages": STAGES,
        "intervals": {"log_samples": 8, "checkpoint_samples": 10_000, "keep_checkpoints": 9},
        "ema": {"half_life_samples": 64},
    }  # fmt: skip
    return make_config(*arguments, **changes)


def saved(run: Path, samples: int, which: str = "model") -> dict[str, torch.Tensor]:
    return weights(run / f"checkpoints/samples-{samples:012d}" / which)


@pytest.mark.parametrize(("zero_stage", "world_size"), [(0, 1), (1, 2)])
def test_a_run_stopped_in_each_stage_and_at_each_boundary_equals_the_uninterrupted_one(
    dataset, model_file, tmp_path, zero_stage, world_size
):
    whole, parts = (config_at(zero_stage, dataset, model_file, tmp_path / n) for n in "ab")
    stops = [2, 3, 4, 6, 7, 8, 9, 0] if world_size == 1 else [3, 5, 9, 0]
    words = [word for stop in stops for word in (write_config(parts), str(stop))]
    sharded = [(stage, name) for stage in (2, 3) for name in "ab"] if world_size == 2 else []
    for stage, name in sharded:  # in the same launch, stopped once
        config = config_at(stage, dataset, model_file, tmp_path / f"{name}{stage}")
        for stop in ("4", "0")[name == "a" :]:
            words += [write_config(config), stop]
    said = run_ranks("train", world_size, write_config(whole), "0", *words)
    for stage, name in sharded:
        a, b = tmp_path / f"a{stage}", tmp_path / f"{name}{stage}"
        assert equal(saved(a, 128), saved(b, 128))
        assert equal(saved(a, 128, "model_ema"), saved(b, 128, "model_ema"))
        assert rows(a) == rows(b)
        for ours, first in zip(rows(a), rows(tmp_path / "a"), strict=True):
            assert ours["loss"] == pytest.approx(first["loss"], rel=2e-2)  # Adam magnifies rounding
    check_locked_and_averaged(tmp_path / "a")
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert equal(saved(tmp_path / "a", 128, "model_ema"), saved(tmp_path / "b", 128, "model_ema"))
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    found = rows(tmp_path / "a")
    assert [row["step"] for row in found] == list(range(1, 11))
    assert [row["stage"] for row in found] == [0] * 3 + [1] * 3 + [2] * 2 + [3] * 2
    assert [row["samples_seen"] for row in found][-5:] == [96, 104, 112, 120, 128]
    assert found[3]["learning_rate"] == 0.001 * 16 / 32  # each stage warms up anew
    assert "test, stage 3 tune: global batch 8 = " in said
    folders = sorted((tmp_path / "b/checkpoints").glob("samples-*"))
    counts = np.load(tmp_path / "a/tokenizer/token_counts.npy")
    vocabulary = json.loads((tmp_path / "a/tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    assert counts[vocabulary["square"]] == counts[vocabulary["a"]] == 96  # once a caption
    assert counts[vocabulary["<end>"]] == 0
    assert {48, 96, 112, 128} <= {read_record(folder).samples_seen for folder in folders}
    small, large = (tmp_path / f"b/checkpoints/samples-{n:012d}" for n in (48, 128))
    for folder, size, length in ((small, 8, 5), (large, 16, 8)):
        described = json.loads((folder / "model/open_clip_config.json").read_text())["model_cfg"]
        assert described["vision_cfg"]["image_size"] == size
        assert described["text_cfg"]["context_length"] == length
        written = json.loads((folder / "model/tokenizer.json").read_text())
        assert written["truncation"]["max_length"] == length
        loaded, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder / 'model'}")
        assert loaded.visual.image_size in (size, (size, size))
        assert loaded.positional_embedding.shape[0] == length


def check_locked_and_averaged(run: Path) -> None:
    """Locked towers stand still in their stages; what was locked is averaged from there on."""
    at = {samples: saved(run, samples) for samples in (48, 96, 112, 128)}
    tower = {n for n in at[48] if n.startswith(("transformer", "token_embedding", "text_proj"))}
    assert len(tower) > 20
    assert all(torch.equal(at[96][n], at[128][n]) for n in tower)
    assert not any(torch.equal(at[48][n], at[96][n]) for n in tower if n.endswith("c_fc.weight"))
    blocks = {n for n in at[48] if n.startswith("visual.transformer")}
    averages = saved(run, 96, "model_ema")
    for name in blocks:  # near where it was while locked and where it is: no fresh weights
        moved = (at[96][name] - at[48][name]).abs().max()
        assert (averages[name] - at[96][name]).abs().max() <= 2 * moved, name


def sin_cos(width: int, side: int, cls_token: bool) -> np.ndarray:
    from open_clip.pos_embed import get_2d_sincos_pos_embed

    return get_2d_sincos_pos_embed(width, side, cls_token=cls_token)


def model(size: int, length: int, positions: str = "learnable", seed: int = 0) -> ClipModel:
    torch.manual_seed(seed)
    vision = {**TINY_MODEL["vision_cfg"], "image_size": size, "pos_embed_type": positions}
    text = {**TINY_MODEL["text_cfg"], "context_length": length, "vocab_size": 32}
    return ClipModel({**TINY_MODEL, "vision_cfg": vision, "text_cfg": text})


def weights_of(built: ClipModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in built.named_parameters()}


def test_learned_positions_are_resized_and_everything_else_is_the_same():
    small, large = model(8, 4), model(16, 8, seed=1)
    before = weights_of(small)
    y, x = torch.meshgrid(torch.arange(2.0), torch.arange(2.0), indexing="ij")
    before["clip.visual.positional_embedding"][1:, 0] = (3 * y + x).flatten()  # a ramp
    before["clip.positional_embedding"][:, 0] = torch.arange(4.0)
    carry_weights(before, small.config, large)
    after = weights_of(large)
    resized = {"clip.visual.positional_embedding", "clip.positional_embedding"}
    assert all(torch.equal(after[n], before[n]) for n in before.keys() - resized)
    patches = after["clip.visual.positional_embedding"]
    assert torch.equal(patches[0], before["clip.visual.positional_embedding"][0])  # class token
    grid = patches[1:, 0].view(4, 4)
    assert grid.mean() == pytest.approx(2.0)
    assert (grid.diff(dim=0) > 0).all()
    assert (grid.diff(dim=1) > 0).all()
    # Linear, half-pixel centres: position i of 8 looks at (i + 0.5) / 2 - 0.5 of 4, held inside.
    expected = [min(3.0, max(0.0, (i + 0.5) / 2 - 0.5)) for i in range(8)]
    assert after["clip.positional_embedding"][:, 0].tolist() == pytest.approx(expected)


def test_sine_cosine_positions_are_those_of_the_new_grid_and_can_be_learned_from_there():
    small, large = model(8, 4, "sin_cos_2d"), model(16, 4, "sin_cos_2d", seed=1)
    carry_weights(weights_of(small), small.config, large)
    expected = sin_cos(32, 4, cls_token=True).astype(np.float32)
    assert np.array_equal(large.clip.visual.positional_embedding.numpy(), expected)
    assert not large.clip.visual.positional_embedding.requires_grad
    tuned = model(16, 4, "learnable", seed=2)
    carry_weights(weights_of(large), large.config, tuned)
    assert np.array_equal(tuned.clip.visual.positional_embedding.detach().numpy(), expected)
    assert tuned.clip.visual.positional_embedding.requires_grad


def test_an_image_size_that_does_not_divide_into_patches_is_refused(dataset, model_file, tmp_path):
    config = make_config(dataset, model_file, tmp_path / "run", image_size=10)
    with pytest.raises(ConfigError, match="image_size 10 does not divide into patches of 4 px"):
        stage_model_config(config)
