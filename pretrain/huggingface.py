"""A checkpoint's model in the form of transformers' CLIPModel, where it is one.

    export_huggingface(Path("runs/demo/pretrain"), Path("exported"))
    CLIPModel.from_pretrained("exported"); AutoTokenizer.from_pretrained("exported")

The same weights under transformers' names; features are equal to rounding. Two things differ in
form: attention's three maps are cut apart, and the end token. CLIPModel pools at the first end
token, except that for an id of 2 it takes the highest id of the text (its own older mistake, kept
there): such an id changes places with the last of the vocabulary, in the embedding and in
tokenizer.json. No transformers is needed to write it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import CheckpointError
from configs.publish import published_folder
from pretrain.checkpoint import OPEN_CLIP_CONFIG, exportable
from pretrain.model.clip import WEIGHTS_FILE, Json
from pretrain.model.tokenizer import TOKENIZER_FILE

_MISTAKEN_ID = 2  # transformers/models/clip/modeling_clip.py, CLIPTextModel.forward
_EPS = 1.0e-5
# What CLIPModel has, beside the sizes: any other key of a model JSON must say one of these.
_SIZES = {
    "vision_cfg": {"image_size", "patch_size", "layers", "width", "head_width", "mlp_ratio"},
    "text_cfg": {"context_length", "vocab_size", "layers", "width", "heads", "mlp_ratio"},
}
_ALLOWED: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {"quick_gelu": (True, False), "init_logit_scale": (), "final_norm": (True,)},
    "vision_cfg": {"pool_type": ("tok",), "patch_dropout": (), "pos_embed_type": ("learnable",)},
    "text_cfg": {
        "pool_type": ("argmax", "eos"),
        "eos_id": (),
        "pad_id": (),
        "hf_tokenizer_name": (),
        "tokenizer_kwargs": (),
    },
}
_LAYER = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_WHOLE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # transformers' spelling
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
_TOWERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}


def export_huggingface(path: Path, destination: Path) -> Path:
    """Write the model that `path` means as a folder for CLIPModel.from_pretrained.

    Raises CheckpointError where transformers has no such model, with every reason.
    """
    source = exportable(path, destination)
    description = json.loads((source / OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))
    config = description["model_cfg"]
    reasons = _differences(config)
    if reasons:
        raise CheckpointError(
            f"{path} is no CLIPModel of transformers: {'; '.join(reasons)}. Export it in "
            "open_clip's form (no --form), which has these."
        )
    tokenizer = json.loads((source / TOKENIZER_FILE).read_text(encoding="utf-8"))
    end_token, end = _end_of(tokenizer)
    last = config["text_cfg"]["vocab_size"] - 1
    renumbered = {end: last, last: end} if end == _MISTAKEN_ID else {}
    tensors = _renamed(load_file(source / WEIGHTS_FILE), renumbered)
    end = renumbered.get(end, end)
    tokenizer = _tokenizer(tokenizer, renumbered)
    files = {
        "config.json": _config(config, end, float(tensors["logit_scale"])),
        "preprocessor_config.json": _preprocessor(config, description["preprocess_cfg"]),
        TOKENIZER_FILE: tokenizer,
        "tokenizer_config.json": _tokenizer_config(tokenizer, config, end_token),
    }
    with published_folder(destination) as temporary:
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        for name, content in files.items():
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (temporary / name).write_text(text + "\n", encoding="utf-8")
    return destination


def _differences(config: Json) -> list[str]:
    """Return every key of a model JSON that says what CLIPModel does not do."""
    reasons = []
    for section, allowed in _ALLOWED.items():
        keys = config if not section else config[section]
        known = {"embed_dim", "vision_cfg", "text_cfg"} if not section else _SIZES[section]
        for key, value in keys.items():
            is_allowed = key in known or (
                key in allowed and (not allowed[key] or value in allowed[key])
            )
            if not is_allowed and value not in (None, False):
                reasons.append(f"{section + '.' if section else ''}{key} = {value}")
    return reasons


def _config(config: Json, end: int, logit_scale: float) -> Json:
    vision, text = config["vision_cfg"], config["text_cfg"]
    width, text_width = vision.get("width", 768), text.get("width", 512)
    both = {
        "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
        "layer_norm_eps": _EPS,
        "projection_dim": config["embed_dim"],
        "attention_dropout": 0.0,
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "logit_scale_init_value": logit_scale,
        "vision_config": {
            **both,
            "model_type": "clip_vision_model",
            "hidden_size": width,
            "intermediate_size": int(width * vision.get("mlp_ratio", 4.0)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": width // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "num_channels": 3,
        },
        "text_config": {
            **both,
            "model_type": "clip_text_model",
            "hidden_size": text_width,
            "intermediate_size": int(text_width * text.get("mlp_ratio", 4.0)),
            "num_hidden_layers": text.get("layers", 12),
            "num_attention_heads": text.get("heads", 8),
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "eos_token_id": end,
            "bos_token_id": None,
            "pad_token_id": end,
        },
    }


def _preprocessor(config: Json, preprocess: Json) -> Json:
    size = config["vision_cfg"]["image_size"]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": preprocess["mean"],
        "image_std": preprocess["std"],
    }


def _renamed(tensors: dict[str, Tensor], renumbered: dict[int, int]) -> dict[str, Tensor]:
    """Return the weights under transformers' names; rows of renumbered tokens change places."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _WHOLE:
            found[_WHOLE[name]] = tensor
        elif name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = tensor.T.contiguous()
        else:
            found |= _of_layer(name, tensor)
    if renumbered:
        table = found[_WHOLE["token_embedding.weight"]].clone()
        old, new = list(renumbered), list(renumbered.values())
        table[new] = tensors["token_embedding.weight"][old]
        found[_WHOLE["token_embedding.weight"]] = table
    return found


def _of_layer(name: str, tensor: Tensor) -> dict[str, Tensor]:
    tower = next((prefix for prefix in _TOWERS if name.startswith(prefix)), None)
    if tower is None:
        raise CheckpointError(f"transformers' CLIPModel has no place for the weight {name!r}.")
    number, rest = name.removeprefix(tower).split(".", 1)
    layer = f"{_TOWERS[tower]}{number}."
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = rest.removeprefix("attn.in_proj_")
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{layer}self_attn.{p}_proj.{kind}": part.contiguous() for p, part in parts}
    for ours, theirs in _LAYER.items():
        if rest.startswith(ours):
            return {layer + theirs + rest.removeprefix(ours): tensor}
    raise CheckpointError(f"transformers' CLIPModel has no place for the weight {name!r}.")


def _end_of(tokenizer: Json) -> tuple[str, int]:
    """Return the token that ends each text, and its id."""
    processor = tokenizer["post_processor"]
    token: str = processor["single"][-1]["SpecialToken"]["id"]
    return token, int(processor["special_tokens"][token]["ids"][0])


def _tokenizer(tokenizer: Json, renumbered: dict[int, int]) -> Json:
    """Return tokenizer.json with renumbered ids, and with the cleaning that ours does before."""
    vocabulary = tokenizer["model"]["vocab"]
    moved = {token: renumbered.get(number, number) for token, number in vocabulary.items()}
    tokenizer["model"]["vocab"] = dict(sorted(moved.items(), key=lambda item: item[1]))
    for token in tokenizer["added_tokens"]:
        token["id"] = renumbered.get(token["id"], token["id"])
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    for token in tokenizer["post_processor"]["special_tokens"].values():
        token["ids"] = [renumbered.get(number, number) for number in token["ids"]]
    if tokenizer["normalizer"] is None:  # CLIP's: what transformers' CLIPTokenizer does
        blanks = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
        steps = [{"type": "NFC"}, blanks, {"type": "Lowercase"}]
        tokenizer["normalizer"] = {"type": "Sequence", "normalizers": steps}
    return tokenizer


def _tokenizer_config(tokenizer: Json, config: Json, end_token: str) -> Json:
    unknown = tokenizer["model"].get("unk_token")
    # Padding comes after the end token, which causal attention and pooling never look past.
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["text_cfg"]["context_length"],
        "clean_up_tokenization_spaces": False,
        "pad_token": end_token,
        "eos_token": end_token,
        **({"unk_token": unknown} if unknown else {}),
    }
