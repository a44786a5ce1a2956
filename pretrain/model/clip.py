"""The two-tower model: open_clip's own, from one of its JSON configs, with pairmill's additions.

The additions: it takes uint8 images and normalizes them on the device, gathers the kept patches
that the loader drew, carries its similarity and the heads that only training needs, can leave out
the towers' last normalization (`final_norm: false`, EuCLIP), and writes itself as a folder that
open_clip loads by `local-dir:` where the model is one of open_clip's, and refuses where it is not.

Legend: b local samples, H W pixels, L tokens, K kept patches, D embedding width, P of a projection.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.errors import ConfigError, did_you_mean
from configs.load import SHIPPED
from pretrain.model.features import Features
from pretrain.model.heads import Heads
from pretrain.model.logits import Logits
from pretrain.model.patches import PatchGather, encode_text
from pretrain.model.similarity import CONFIG_FILE, NEEDS_PAIRMILL, Similarity, similarity_of
from pretrain.model.torchvision_ops import ensure_torchvision

ensure_torchvision()
import open_clip  # noqa: E402
from open_clip.model import (  # noqa: E402
    CLIPTextCfg,
    CLIPVisionCfg,
    resize_pos_embed,
    resize_text_pos_embed,
)

__all__ = ["ClipModel", "Json", "build_clip", "load_clip", "open_clip", "read_model_config",
           "resize_pos_embed", "resize_text_pos_embed"]  # fmt: skip

_TOWERS: dict[str, Any] = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}
_NEEDED = {
    "vision_cfg": ("image_size", "patch_size", "layers"),
    "text_cfg": ("context_length", "vocab_size"),
}
DEFAULT_IMAGE_WIDTH = int(CLIPVisionCfg.width)
WEIGHTS_FILE = "open_clip_model.safetensors"
Json = dict[str, Any]


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
        shipped = sorted(path.stem for path in (SHIPPED / "models").glob("*.json"))
        near = did_you_mean(name, [*shipped, *open_clip.list_models()])
        raise ConfigError(
            f"model {name!r} is neither a JSON file, nor shipped with pairmill "
            f"({', '.join(shipped)}), nor one of open_clip's (see open_clip.list_models()){near}"
        )
    return _checked(name, found)


def _checked(name: str, config: Any) -> Json:
    if isinstance(config, dict):
        config = config.get("model_cfg", config)
    if not isinstance(config, dict) or not all(isinstance(config.get(s), dict) for s in _TOWERS):
        raise ConfigError(
            f"model {name}: expected an object with embed_dim, vision_cfg and text_cfg."
        )
    problems = _unknown("", config, {"embed_dim", "quick_gelu", "final_norm", *_TOWERS})
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


def build_clip(config: Json) -> open_clip.CLIP:
    """Build open_clip's CLIP from a model_cfg, without the last norms where it says so."""
    plain = {k: v for k, v in config.items() if k not in ("final_norm", NEEDS_PAIRMILL)}
    # A 0-dim parameter cannot be broadcast by deepspeed.initialize: keep scale and bias 1-dim.
    clip = open_clip.CLIP(**plain, nonscalar_logit_scale=True)
    if not config.get("final_norm", True):
        clip.visual.ln_post = nn.Identity()
        clip.ln_final = nn.Identity()
    return clip


def load_clip(folder: Path) -> open_clip.CLIP:
    """Load the model of a folder that `ClipModel.save` wrote, also one that open_clip refuses.

    Raises RuntimeError where weights and configuration do not fit.
    """
    description = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    clip = build_clip(description["model_cfg"])
    tensors = load_file(folder / WEIGHTS_FILE)
    for name in ("logit_scale", "logit_bias"):
        if name in tensors:
            tensors[name] = tensors[name].reshape(1)
    clip.load_state_dict(tensors)
    return clip


class ClipModel(nn.Module):
    """open_clip's CLIP behind the call that training needs."""

    def __init__(
        self,
        config: Json,
        similarity: Similarity | None = None,
        *,
        logits: Logits | None = None,
        heads: Heads | None = None,
    ) -> None:
        """Build with fresh weights from an open_clip `model_cfg`.

        `logits` is where scale and bias start (its similarity's default by default).
        """
        super().__init__()
        self.similarity = similarity or similarity_of({})
        logits = logits or Logits(scale=self.similarity.initial_logit_scale)
        self.config = dict(config)
        if self.config.get("final_norm"):
            del self.config["final_norm"]  # as open_clip has it: it does not know the key
        if logits.bias is not None:
            self.config["init_logit_bias"] = logits.bias
        self.clip = build_clip(self.config)
        if not hasattr(self.clip.visual, "patch_dropout"):
            raise ConfigError(
                "the image tower is not open_clip's VisionTransformer, the only one that token "
                "reduction supports so far; choose a model JSON without timm_model_name."
            )
        logits.start(self.clip)
        self.heads = heads or Heads()
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
        return self.patch_rows**2

    @property
    def patch_rows(self) -> int:
        """Patches along one side of an image."""
        return self.image_size // int(self.config["vision_cfg"]["patch_size"])

    @property
    def context_length(self) -> int:
        """Tokens of one text."""
        return int(self.config["text_cfg"]["context_length"])

    def forward(
        self,
        image_b3HW: Tensor,
        token_bL: Tensor,
        kept_bK: Tensor | None = None,
        view_bv3HW: Tensor | None = None,
        negative_token_bL: Tensor | None = None,
        negative_image_b3HW: Tensor | None = None,
        teacher: tuple[Tensor, Tensor, Tensor] | None = None,
        kept_text_bK: Tensor | None = None,
        kept_view_bvK: Tensor | None = None,
        mean_target_bP: Tensor | None = None,
    ) -> Features:
        """Encode uint8 images and token ids; with `kept_bK`, only those patches of each image,
        with `kept_text_bK` only those positions of each text.

        `view_bv3HW` are two augmented views of each image, encoded whole. With `kept_view_bvK` (and
        `mean_target_bP`; attentive.py) the views are the images, of which those patches are
        encoded, and `image_b3HW` is not. `teacher` is what the
        frozen teacher gives for the batch: image and text features of length 1, and its exp(s).
        """
        more: dict[str, Any] = {}
        if kept_view_bvK is not None:
            assert view_bv3HW is not None, "kept patches are those of views"
            image_bD, found = self._attended(view_bv3HW, kept_view_bvK)
            more = {**found, "mean_target_bP": mean_target_bP}
        else:
            with self.patches.keeping(kept_bK):
                image_bD = self.clip.encode_image(self.pixels(image_b3HW))
            if view_bv3HW is not None:
                more["view_a_bP"], more["view_b_bP"] = self._projected(view_bv3HW)
        text_bD = encode_text(self.clip, token_bL, kept_text_bK)
        dtype = torch.promote_types(image_bD.dtype, torch.float32)  # losses are not in bfloat16
        bias = self.clip.logit_bias
        if bias is not None:
            more["logit_bias"] = bias.to(dtype)
        if negative_token_bL is not None:
            more["negative_text_bD"] = self.clip.encode_text(negative_token_bL)
        if negative_image_b3HW is not None:
            more["negative_image_bD"] = self.clip.encode_image(self.pixels(negative_image_b3HW))
        if teacher is not None:
            names = ("teacher_image_bE", "teacher_text_bE", "teacher_scale")
            more |= zip(names, teacher, strict=True)
            more |= self.heads.to_teacher(image_bD, text_bD)
        return Features(image_bD, text_bD, self.clip.logit_scale.to(dtype).exp(), **more)

    def pixels(self, image_b3HW: Tensor) -> Tensor:
        """Return the normalized pixels that the image tower takes, from uint8."""
        # The operations of torchvision's ToTensor and Normalize, in their order: bit-equal
        # features.
        pixels = (image_b3HW.to(torch.float32) / 255 - self.mean) / self.std
        return pixels.to(self.clip.visual.conv1.weight.dtype)

    def _projected(self, view_bv3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Return SLIP's projections [b, P] of the pooled features before the last map."""
        assert self.heads.views is not None, "the model was built without a head for views"
        _, pooled = self._encoded(view_bv3HW.flatten(0, 1))
        first, second = self.heads.views(pooled).unflatten(0, view_bv3HW.shape[:2]).unbind(1)
        return first, second

    def _encoded(self, image_n3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features [n, D] of uint8 images, and what they are mapped from [n, W].

        The tower is called as a module, never in pieces: ZeRO 3 gathers its weights by its hooks.
        """
        visual: Any = self.clip.visual
        pool, found = visual._pool, []

        def noting(token_nTW: Tensor) -> tuple[Tensor, Tensor]:
            pooled, tokens = pool(token_nTW)
            found.append(pooled)
            return pooled, tokens

        visual._pool = noting
        try:
            image_nD: Tensor = visual(self.pixels(image_n3HW))
        finally:
            del visual._pool
        return image_nD, found[0]

    def _attended(
        self, view_bv3HW: Tensor, kept_view_bvK: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the features of the first view [b, D], and the fields of `Features` that the
        objectives of masked views take.
        """
        shape = view_bv3HW.shape[:2]
        with self.patches.keeping(kept_view_bvK.flatten(0, 1)):
            image_nD, pooled = self._encoded(view_bv3HW.flatten(0, 1))
        image_bD, *others = image_nD.view(*shape, -1).unbind(1)
        more = dict(zip(("second_image_bD",), others, strict=False))
        if self.heads.views is not None:
            found = self.heads.views(pooled).unflatten(0, shape).unbind(1)
            more |= zip(("view_a_bP", "view_b_bP"), found, strict=True)
        if self.heads.mean_projector is not None:
            assert self.heads.mean_predictor is not None
            online = self.heads.mean_predictor(self.heads.mean_projector(pooled))
            found = online.unflatten(0, shape).unbind(1)
            more |= zip(("online_a_bP", "online_b_bP"), found, strict=True)
        return image_bD, more

    @property
    def is_open_clips(self) -> bool:
        """Whether open_clip itself has this model: cosine similarity, towers with their norms."""
        return self.similarity.name == "cosine" and self.config.get("final_norm", True)

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write `weights` (this module's names) as a folder that open_clip loads by `local-dir:`,
        or refuses where it has no such model.

        The caller publishes the folder (configs.publish.published_folder).
        """
        preprocess = {
            "mean": list(open_clip.OPENAI_DATASET_MEAN),
            "std": list(open_clip.OPENAI_DATASET_STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        }
        learned = {
            name.removeprefix("similarity."): tensor
            for name, tensor in weights.items()
            if name.startswith("similarity.")
        }
        refused = {} if self.is_open_clips else {NEEDS_PAIRMILL: True}
        description = {
            "model_cfg": {**self.config, **refused},
            "preprocess_cfg": preprocess,
            "pairmill": {"similarity": self.similarity.section(learned)},
        }
        (folder / CONFIG_FILE).write_text(
            json.dumps(description, indent=2) + "\n", encoding="utf-8"
        )
        tensors = {
            name.removeprefix("clip."): tensor.detach().to("cpu", torch.float32).contiguous()
            for name, tensor in weights.items()
            if name.startswith("clip.")
        }
        # open_clip's own scalars are 0-dim; it loads [1]-shaped ones, other readers may not.
        for name in {"logit_scale", "logit_bias"} & set(tensors):
            tensors[name] = tensors[name].reshape(())
        save_file(tensors, folder / WEIGHTS_FILE)
