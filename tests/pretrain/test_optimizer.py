"""What learns how fast, what is frozen, and towers that start from weights that exist."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs.errors import ConfigError
from pretrain.initial import start_towers, timm_vision_transformer
from pretrain.model.clip import ClipModel, read_model_config
from pretrain.model.tokenizer import Tokenizer
from pretrain.optimizer import build_optimizer, lock, parameter_groups
from tests.pretrain.conftest import TINY_MODEL, make_config


@pytest.fixture
def model(model_file):
    return ClipModel(read_model_config(str(model_file)))


def scales(model, config) -> dict[str, tuple[float, float]]:
    """Each parameter's learning rate as a multiple of the run's, and its weight decay."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(model, config)
        for p in group["params"]
    }


def test_towers_have_their_own_rate_decay_and_layer_decay(model, dataset, model_file, tmp_path):
    towers = {
        "image": {"learning_rate": 0.0003, "weight_decay": 0.05, "layer_decay": 0.5},
        "text": {"layer_decay": 0.1},
    }
    found = scales(model, make_config(dataset, model_file, tmp_path, towers=towers))
    block = "transformer.resblocks.{}.mlp.c_fc.weight"
    expected = {  # two blocks: depths 0 .. 3, exponents 3 .. 0; the run's rate is 0.003
        "clip.visual.conv1.weight": (0.1 * 0.5**3, 0.05),
        "clip.visual.positional_embedding": (0.1 * 0.5**3, 0.0),
        f"clip.visual.{block.format(0)}": (0.1 * 0.5**2, 0.05),
        f"clip.visual.{block.format(1)}": (0.1 * 0.5, 0.05),
        "clip.visual.ln_post.weight": (0.1, 0.0),
        "clip.visual.proj": (0.1, 0.05),
        "clip.token_embedding.weight": (0.1**3, 0.2),
        f"clip.{block.format(1)}": (0.1, 0.2),
        "clip.text_projection": (1.0, 0.2),
        "clip.logit_scale": (1.0, 0.0),
    }
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, (scale, decay) in expected.items():
        assert found[name] == (pytest.approx(scale), decay), name


def test_a_locked_tower_learns_only_its_last_groups(model, dataset, model_file, tmp_path):
    def learned(unlocked: int) -> set[str]:
        towers = {"image": {"lock": True, "unlocked_groups": unlocked}}
        model.requires_grad_(True)
        lock(model, make_config(dataset, model_file, tmp_path, towers=towers))
        names = (n for n, p in model.named_parameters() if p.requires_grad)
        return {n.removeprefix("clip.visual.") for n in names if ".visual." in n}

    assert learned(0) == set()
    assert learned(1) == {"ln_post.weight", "ln_post.bias", "proj"}
    assert {n.split(".")[2] for n in learned(2) if "resblocks" in n} == {"1"}
    assert all(p.requires_grad for n, p in model.named_parameters() if "visual" not in n)


def test_sgd_is_plain_and_adamw_as_configured(model, dataset, model_file, tmp_path):
    for name, kind in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        optimizer = {"name": name, "beta2": 0.95}
        config = make_config(dataset, model_file, tmp_path, optimizer=optimizer)
        built = build_optimizer(model, config)
        assert type(built) is kind
        wanted = {"momentum": 0} if name == "sgd" else {"betas": (0.9, 0.95)}
        assert {key: built.defaults[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"zero_stage": 0, "precision": "bf16"}, "bf16 needs zero_stage 1 or more"),
        ({"zero_stage": 3, "compile": True}, "compile needs zero_stage 0, 1 or 2"),
        ({"deepspeed": {"gradient_clipping": 1.0}}, "gradient_clipping (set optimizer.clipping)"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "stage (set engine.zero_stage)"),
    ],
)
def test_keys_that_others_decide_are_refused_by_name(
    dataset, model_file, tmp_path, engine, message
):
    with pytest.raises(ConfigError) as refused:
        make_config(dataset, model_file, tmp_path, engine=engine)
    assert message in str(refused.value)


def saved(folder: Path, model: ClipModel) -> str:
    folder.mkdir()
    model.save(folder, {n: p.detach() for n, p in model.named_parameters()})
    return str(folder)


def test_a_tower_starts_from_a_folder_and_the_other_stays(
    model, dataset, model_file, tmp_path, capsys
):
    folder = saved(tmp_path / "other", ClipModel(read_model_config(str(model_file))))
    towers = {"image": {"initial": folder}}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    start_towers(model, make_config(dataset, model_file, tmp_path / "r", towers=towers), WORDS)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all(name.startswith("clip.visual.") for name in changed)
    assert "image tower: " in capsys.readouterr().err


WORDS = Tokenizer.clip(8)


def test_weights_that_do_not_fit_are_refused_with_all_that_is_wrong(
    model, dataset, model_file, tmp_path
):
    wide = {**TINY_MODEL["vision_cfg"], "layers": 1, "patch_size": 8}
    (tmp_path / "wide.json").write_text(json.dumps({**TINY_MODEL, "vision_cfg": wide}))
    folder = saved(tmp_path / "wide", ClipModel(read_model_config(str(tmp_path / "wide.json"))))
    towers = {"image": {"initial": folder}, "text": {"initial": "timm:vit_tiny_patch16_224"}}
    config = make_config(dataset, model_file, tmp_path / "r", towers=towers)
    with pytest.raises(ConfigError) as refused:
        start_towers(model, config, WORDS)
    said = str(refused.value)
    assert "visual.conv1.weight: got (32, 3, 8, 8), expected (32, 3, 4, 4)" in said
    assert "visual.transformer.resblocks.1.ln_1.weight: got none, expected (32,)" in said
    towers["image"]["initial"] = None
    config = make_config(dataset, model_file, tmp_path / "r", towers=towers)
    with pytest.raises(ConfigError, match="timm has image towers only"):
        start_towers(model, config, WORDS)


def test_a_timm_vision_transformer_gives_the_same_features_in_open_clips_tower():
    import timm

    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **shape)
    with torch.no_grad():
        for parameter in vit.parameters():  # biases are zero at the start
            parameter.add_(torch.randn_like(parameter) * 0.1)
    vision = {**TINY_MODEL["vision_cfg"], "no_ln_pre": True}
    model = ClipModel({**TINY_MODEL, "vision_cfg": vision})
    visual = model.clip.visual
    state = {
        name.removeprefix("visual."): tensor
        for name, tensor in timm_vision_transformer(vit.state_dict()).items()
    }
    missing, unexpected = visual.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["proj"], [])
    visual.proj = None
    image = torch.randn(3, 3, 16, 16)
    with torch.no_grad():  # the norms' eps is 1e-6 there and 1e-5 here
        torch.testing.assert_close(visual(image), vit.eval()(image), atol=1e-4, rtol=1e-3)


def test_open_clips_local_weights_are_a_source_and_pickles_are_not(
    model, dataset, model_file, tmp_path
):
    towers = {"image": {"initial": "open_clip:ViT-B-32"}}
    with pytest.raises(ConfigError, match="expected open_clip:MODEL/TAG"):
        start_towers(model, make_config(dataset, model_file, tmp_path, towers=towers), WORDS)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    towers = {"image": {"initial": f"open_clip:ViT-B-32/{tmp_path / 'absent.pt'}"}}
    with pytest.raises(ConfigError, match="open_clip cannot load it"):
        start_towers(model, make_config(dataset, model_file, tmp_path, towers=towers), WORDS)
