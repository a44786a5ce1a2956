"""What a stage costs before it runs: FLOPs of a sample, bytes on a rank.

FLOPs of one forward pass: a tower of `layers` blocks of width w over T tokens takes
layers (2 T (4 w^2 + 2 r w^2) + 4 T^2 w), r = 4 the width of the MLP over w, and the patches
2 N 3 p^2 w for N of p x p pixels (multiply and add are two; open_clip's model_profile.csv counts
the same). Projections, norms, the loss and a frozen teacher are left out. A training step is three
forward passes of everything that is encoded (views and hard negatives too), and with attentive
masking one more of the whole image by the mean tower.

Legend: w width, T tokens, N patches, p pixels a patch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pretrain.model.clip import DEFAULT_IMAGE_WIDTH, Json, open_clip
from pretrain.stages import Stage

_MLP = 4  # r; both towers' default
# What backward reads of one block, in widths a token: the input of both norms and their outputs
# (4), queries, keys and values (3), the attention's output (1), the MLP's hidden values before and
# after the activation (8). Attention weights are not kept (torch's fused attention).
_KEPT_WIDTHS = 16


@dataclass(frozen=True)
class Tower:
    """Shape of one transformer; `patch_flops` is what makes its tokens."""

    width: int
    layers: int
    tokens: int
    patch_flops: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward pass of one sample."""
        w, t = self.width, self.tokens
        block = 2 * t * (4 * w * w + 2 * _MLP * w * w) + 4 * t * t * w
        return self.layers * block + self.patch_flops


def towers(stage: Stage, model: Json) -> tuple[Tower, Tower]:
    """Return the image and the text tower as a stage trains them; `model` is its model config."""
    vision, text = model["vision_cfg"], model["text_cfg"]
    patch = int(vision["patch_size"])
    side = int(vision["image_size"]) // patch
    width = int(vision.get("width", DEFAULT_IMAGE_WIDTH))
    kept = stage.config.reduction.build().num_kept(side)
    image = Tower(width, vision["layers"], kept + 1, 2 * side * side * 3 * patch * patch * width)
    default = open_clip.CLIPTextCfg
    length = stage.config.text_reduction.num_tokens or int(text["context_length"])
    return image, Tower(
        text.get("width", default.width), text.get("layers", default.layers), length
    )


def encoded(stage: Stage, model: Json) -> list[Tower]:
    """Return the towers as they are run on a sample, once for each picture and text of it."""
    image, text = towers(stage, model)
    config, needs = stage.config, stage.config.total.needs
    whole = _whole(image, model)
    texts = [text, replace(text, tokens=int(model["text_cfg"]["context_length"]))]
    texts = texts[: 1 + ("negative_text" in needs)]
    if config.reduction.build().in_model:
        return [image] * len(config.data.views) + texts
    others = len(config.data.views) * ("views" in needs) + ("negative_image" in needs)
    return [image, *[whole] * others, *texts]


def _whole(image: Tower, model: Json) -> Tower:
    vision = model["vision_cfg"]
    return replace(image, tokens=(int(vision["image_size"]) // int(vision["patch_size"])) ** 2 + 1)


def step_flops(stage: Stage, model: Json) -> int:
    """Return the floating-point operations of training on one sample."""
    trained = 3 * sum(tower.flops for tower in encoded(stage, model))
    if stage.config.reduction.build().in_model:
        trained += _whole(towers(stage, model)[0], model).flops
    return trained


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: int
    gradients: int
    optimizer: int  # AdamW's moments, and the fp32 weights beside half-precision ones
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(
    stage: Stage, model: Json, *, num_parameters: int, world_size: int, micro_batch: int
) -> Memory:
    """Estimate the bytes of one rank: what ZeRO divides among the ranks, and kept activations.

    Not counted: buffers of communication, the allocator's loss, workspaces of kernels.
    """
    engine = stage.config.engine
    half = engine.precision != "fp32"
    size = 2 if half else 4
    shared = [world_size if engine.zero_stage >= needed else 1 for needed in (3, 2, 1)]
    state = (8 if stage.config.optimizer.name == "adamw" else 0) + (4 if half else 0)
    weights, gradients, optimizer = (
        num_parameters * each // ranks
        for each, ranks in zip((size, size, state), shared, strict=True)
    )
    widths = 1 if engine.activation_checkpointing else _KEPT_WIDTHS  # the input of each block
    kept = sum(t.layers * t.tokens * t.width * widths for t in encoded(stage, model))
    if engine.activation_checkpointing:  # and one block at a time again
        kept += max(t.tokens * t.width * _KEPT_WIDTHS for t in towers(stage, model))
    logits = 2 * 4 * 2 * micro_batch * stage.batch  # two [b, B] matrices, fp32, with gradients
    return Memory(weights, gradients, optimizer, kept * size * micro_batch + logits)
