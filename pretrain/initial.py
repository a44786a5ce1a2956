"""Start a tower from weights that exist: a pairmill or open_clip folder, open_clip's or timm's.

    towers.image.initial: runs/small                       a run, checkpoint or model folder
    towers.text.initial: open_clip:ViT-B-16/laion2b_s34b_b88k   MODEL/TAG, or MODEL/FILE.safetensors
    towers.image.initial: timm:vit_base_patch16_224.augreg_in21k   a ViT, for the image tower

Only tensors are read (safetensors, or torch.load with weights_only): no pickled code. A tower is
taken whole or refused: all that does not fit is said at once. What a source has not, the map into
the embedding space (timm) or one of another width, starts afresh and is named in the log. Positions
are resized by open_clip's rules. Logit scale and bias are the run's own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from configs.errors import ConfigError
from pretrain.checkpoint import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, model_folder, verify_model
from pretrain.config import PretrainConfig
from pretrain.model.clip import ClipModel, open_clip, resize_pos_embed, resize_text_pos_embed
from pretrain.model.tokenizer import TOKENIZER_FILE, Tokenizer

_PROJECTIONS = ("visual.proj", "text_projection")  # may start afresh
_NOT_OF_A_TOWER = ("logit_scale", "logit_bias")
_TIMM_NAMES = (  # timm's VisionTransformer -> open_clip's, in order
    ("cls_token", "class_embedding"), ("pos_embed", "positional_embedding"),
    ("patch_embed.proj.", "conv1."), ("norm_pre.", "ln_pre."),
    ("blocks.", "transformer.resblocks."),
    (".norm1.", ".ln_1."), (".norm2.", ".ln_2."), (".attn.qkv.weight", ".attn.in_proj_weight"),
    (".attn.qkv.bias", ".attn.in_proj_bias"), (".attn.proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."),
)  # fmt: skip


def start_towers(model: ClipModel, config: PretrainConfig, tokenizer: Tokenizer) -> None:
    """Load the towers that the configuration starts from existing weights.

    Raises ConfigError with everything that does not fit, CheckpointError for a damaged folder.
    """
    for tower in ("image", "text"):
        source = config.towers.of(tower).initial
        if source is not None:
            _start(model, tower, source, tokenizer)


def _start(model: ClipModel, tower: str, source: str, tokenizer: Tokenizer) -> None:
    label = f"towers.{tower}.initial {source}"
    found = _read(source, tower, label, tokenizer)
    if tower == "image":
        resize_pos_embed(found, model.clip)
    else:
        resize_text_pos_embed(found, model.clip)
    problems, fresh = [], []
    parameters = {
        name: parameter
        for name, parameter in model.clip.named_parameters()
        if name not in _NOT_OF_A_TOWER and name.startswith("visual.") == (tower == "image")
    }
    for name, parameter in parameters.items():
        got = tuple(found[name].shape) if name in found else None
        if got == tuple(parameter.shape):
            continue
        if name in _PROJECTIONS:
            fresh.append(name)
        else:
            problems.append(f"{name}: got {got or 'none'}, expected {tuple(parameter.shape)}")
    problems += [f"{name}: the model has no such tensor" for name in found.keys() - parameters]
    if problems:
        raise ConfigError(
            "\n  ".join([f"{label}: {len(problems)} problem(s)", *sorted(problems)])
            + "\n  Choose a model JSON of the same tower, or other weights."
        )
    with torch.no_grad():
        for name in parameters.keys() - set(fresh):
            parameters[name].copy_(found[name])
    if not dist.is_initialized() or dist.get_rank() == 0:
        said = f"; {', '.join(fresh)} starts afresh" if fresh else ""
        print(f"{tower} tower: {len(parameters) - len(fresh)} tensors from {source}{said}",
              file=sys.stderr, flush=True)  # fmt: skip


def _read(source: str, tower: str, label: str, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return the tensors of one tower under open_clip's names, in fp32."""
    kind, _, name = source.partition(":")
    if kind == "timm":
        if tower == "text":
            raise ConfigError(f"{label}: timm has image towers only; give it to towers.image.")
        tensors = _from_timm(name, label)
    elif kind == "open_clip":
        model_name, _, tag = name.partition("/")
        if not tag:
            raise ConfigError(f"{label}: expected open_clip:MODEL/TAG, such as ViT-B-32/openai.")
        try:
            clip = open_clip.create_model(model_name, pretrained=tag, weights_only=True)
        except (RuntimeError, ValueError, OSError) as error:
            raise ConfigError(f"{label}: open_clip cannot load it: {error}") from None
        tensors = clip.state_dict()
        _check_tokenizer(tower, label, tokenizer.is_clip)
    else:
        folder = model_folder(Path(source).expanduser())
        verify_model(folder)
        tensors = load_file(folder / OPEN_CLIP_WEIGHTS)
        if (folder / TOKENIZER_FILE).is_file():
            theirs = Tokenizer.load(folder).with_context(tokenizer.context_length)
            _check_tokenizer(tower, label, theirs.to_json() == tokenizer.to_json())
        else:
            description = json.loads((folder / OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))
            text = description["model_cfg"]["text_cfg"]
            _check_tokenizer(tower, label, tokenizer.is_clip and "hf_tokenizer_name" not in text)
    return {
        name: tensor.float()
        for name, tensor in tensors.items()
        if name not in (*_NOT_OF_A_TOWER, "attn_mask")
        and name.startswith("visual.") == (tower == "image")
    }


def _check_tokenizer(tower: str, label: str, same: bool) -> None:
    if tower == "text" and not same:
        raise ConfigError(
            f"{label}: its texts were tokenized otherwise than this run's: set `tokenizer` to "
            "clip for open_clip's models, or to the tokenizer.json of the weights' folder."
        )


def _from_timm(name: str, label: str) -> dict[str, Tensor]:
    import timm

    try:
        vit = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"{label}: timm cannot load it: {error}") from None
    return timm_vision_transformer(vit.state_dict())


def timm_vision_transformer(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a timm ViT's tensors under open_clip's names.

    timm's patch embedding has a bias, open_clip's has not: it is added to the patches' positions,
    where it has the same effect. Heads of classification are left out.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(("head.", "fc_norm.")):
            continue
        for theirs, ours in _TIMM_NAMES:
            name = name.replace(theirs, ours)
        renamed[f"visual.{name}".replace("visual.norm.", "visual.ln_post.")] = tensor
    renamed["visual.class_embedding"] = renamed["visual.class_embedding"].flatten()
    positions = renamed["visual.positional_embedding"][0].clone()
    bias = renamed.pop("visual.conv1.bias", None)
    if bias is not None:
        positions[1:] += bias
    renamed["visual.positional_embedding"] = positions
    return renamed
