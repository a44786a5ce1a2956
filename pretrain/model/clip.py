"""The two-tower model: open_clip's own, from one of its JSON configs, with pairmill's additions.

The additions: it takes uint8 images and normalizes them on the device, gathers the kept patches
that the loader drew, carries its similarity, and writes itself as a folder that open_clip loads by
`local-dir:`.

Legend: b local samples, H W pixels, L tokens, K kept patches, D embedding width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.errors import ConfigError, did_you_mean
from configs.load import SHIPPED
from pretrain.model.patches import PatchGather
from pretrain.model.similarity import CONFIG_FILE, Similarity, similarity_of

_TOWERS: dict[str, Any] = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}
_NEEDED = {
    "vision_cfg": ("image_size", "patch_size", "layers"),
    "text_cfg": ("context_length", "vocab_size"),
}
WEIGHTS_FILE = "open_clip_model.safetensors"
Json = dict[str, Any]


class Features(NamedTuple):
    """What the objective sees: normalized features and the logit scale exp(s), shape [1]."""

    image_bD: Tensor
    text_bD: Tensor
    logit_scale: Tensor


def read_model_config(name: str) -> Json:
    """Read an open_clip model JSON: a path, a name in configs/models, or one of open_clip's own.

    Returns embed_dim, vision_cfg, text_cfg with the defaults that the trainer needs filled in.
    Raises ConfigError with every key that is unknown or not supported.
    """
    for path in (Path(name), SHIPPED / "models" / f"{name}.json"):
        if path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ConfigError(f"{path} is not valid JSON: {error}.") from None
            return _checked(str(path), config)
    found = open_clip.get_model_config(name)
    if found is None:
        shipped = ", ".join(sorted(path.stem for path in (SHIPPED / "models").glob("*.json")))
        raise ConfigError(
            f"model {name!r} is neither a JSON file, nor shipped with pairmill ({shipped}), nor "
            "one "
            "of open_clip's (see open_clip.list_models())."
        )
    return _checked(name, found)


def _checked(name: str, config: Any) -> Json:
    if isinstance(config, dict):
        config = config.get("model_cfg", config)
    if not isinstance(config, dict) or not all(isinstance(config.get(s), dict) for s in _TOWERS):
        raise ConfigError(
            f"model {name}: expected an object with embed_dim, vision_cfg and text_cfg."
        )
    problems = _unknown("", config, {"embed_dim", "quick_gelu", "init_logit_scale", *_TOWERS})
    filled = dict(config)
    for section, fields in _TOWERS.items():
        known = {field.name: field.default for field in dataclasses.fields(fields)}
        problems += _unknown(f"{section}.", config[section], known)
        defaults = {key: known[key] for key in _NEEDED[section]}
        filled[section] = {**defaults, **config[section]}
        for key in sorted({"timm_model_name", "hf_model_name"} & set(config[section])):
            problems.append(f"{section}.{key}: only open_clip's own towers are supported so far")
    if not isinstance(config.get("embed_dim"), int):
        problems.append("embed_dim: a number is required")
    if not isinstance(filled["vision_cfg"]["layers"], int):
        problems.append(
            "vision_cfg.layers: a ResNet; only vision transformers are supported so far"
        )
    if problems:
        raise ConfigError("\n  ".join([f"model {name}: {len(problems)} problem(s)", *problems]))
    return filled


def _unknown(prefix: str, section: Json, known: Collection[str]) -> list[str]:
    return [
        f"{prefix}{key}: there is no such key{did_you_mean(key, known)}"
        for key in sorted(set(section) - set(known))
    ]


class ClipModel(nn.Module):
    """open_clip's CLIP behind the call that training needs."""

    def __init__(self, config: Json, similarity: Similarity | None = None) -> None:
        """Build with fresh weights from an open_clip `model_cfg`."""
        super().__init__()
        self.config = config
        self.similarity = similarity or similarity_of({})
        # A 0-dim parameter cannot be broadcast by deepspeed.initialize: keep the scale 1-dim.
        self.clip = open_clip.CLIP(**config, nonscalar_logit_scale=True)
        if not hasattr(self.clip.visual, "patch_dropout"):
            raise ConfigError(
                "the image tower is not open_clip's VisionTransformer, the only one that token "
                "reduction supports so far; choose a model JSON without timm_model_name."
            )
        self.patches = self.clip.visual.patch_dropout = PatchGather()
        mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(1, 3, 1, 1)
        std = torch.tensor(open_clip.OPENAI_DATASET_STD).view(1, 3, 1, 1)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    @property
    def image_size(self) -> int:
        """Side of the square input, in pixels."""
        return int(self.config["vision_cfg"]["image_size"])

    @property
    def num_patches(self) -> int:
        """Patches of one image before any reduction."""
        return (self.image_size // int(self.config["vision_cfg"]["patch_size"])) ** 2

    @property
    def context_length(self) -> int:
        """Tokens of one text."""
        return int(self.config["text_cfg"]["context_length"])

    def forward(
        self, image_b3HW: Tensor, token_bL: Tensor, kept_bK: Tensor | None = None
    ) -> Features:
        """Encode uint8 images and token ids; with `kept_bK`, only those patches of each image."""
        weight = self.clip.visual.conv1.weight
        # The operations of torchvision's ToTensor and Normalize, in their order: bit-equal
        # features.
        pixels = ((image_b3HW.to(torch.float32) / 255 - self.mean) / self.std).to(weight.dtype)
        self.patches.kept_bK = kept_bK
        try:
            image_bD = self.clip.encode_image(pixels)
        finally:
            self.patches.kept_bK = None
        text_bD = self.clip.encode_text(token_bL)
        # Half-precision towers, but lengths, logits and losses in float32.
        dtype = torch.promote_types(image_bD.dtype, torch.float32)
        normalize = self.similarity.normalize
        return Features(
            normalize(image_bD.to(dtype)),
            normalize(text_bD.to(dtype)),
            self.clip.logit_scale.to(dtype).exp(),
        )

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write `weights` (this module's names) as a folder that open_clip loads by `local-dir:`.

        The caller publishes the folder (configs.publish.published_folder).
        """
        preprocess = {
            "mean": list(open_clip.OPENAI_DATASET_MEAN),
            "std": list(open_clip.OPENAI_DATASET_STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        }
        description = {
            "model_cfg": self.config,
            "preprocess_cfg": preprocess,
            "pairmill": {"similarity": {"name": self.similarity.name}},
        }
        (folder / CONFIG_FILE).write_text(
            json.dumps(description, indent=2) + "\n", encoding="utf-8"
        )
        tensors = {
            name.removeprefix("clip."): tensor.detach().to("cpu", torch.float32).contiguous()
            for name, tensor in weights.items()
        }
        # open_clip's own logit scale is 0-dim; it loads a [1]-shaped one, other readers may not.
        tensors["logit_scale"] = tensors["logit_scale"].reshape(())
        save_file(tensors, folder / WEIGHTS_FILE)
