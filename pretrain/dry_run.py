"""Check a run before it is queued: configuration, dataset, batch arithmetic, model size, and
whether data or model will be the limit.
"""

from __future__ import annotations

import os

import torch

from pretrain.arithmetic import describe
from pretrain.build import build_model, check_batch, read_data, stage_model_config
from pretrain.config import PretrainConfig
from pretrain.stages import Stages
from pretrain.throughput import measure

_BYTES_A_PARAMETER = 16  # fp32 weight and gradient, two AdamW moments


def dry_run(config: PretrainConfig, *, seconds: float = 3.0) -> str:
    """Return what a run would do, in words; raise the error that it would end with.

    Tars without an index are indexed, as the run would do. The loader, and where there is a device
    the model, run for some `seconds` each.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_batch(config, world_size)
    data = read_data(config)
    model_config = stage_model_config(config)
    if config.tokenizer.name == "words":  # not trained yet: it can have no more than this
        model_config["text_cfg"]["vocab_size"] = config.tokenizer.vocab_size
    vocabulary = model_config["text_cfg"]["vocab_size"]
    with torch.device("meta"):
        model = build_model(config, model_config, None)
    image = sum(p.numel() for p in model.clip.visual.parameters())
    total = sum(p.numel() for p in model.parameters())
    kept = config.reduction.build().num_kept(model.patch_rows)
    warmup = config.optimizer.warmup_samples / config.global_batch_size
    last = config.num_steps * config.global_batch_size
    checkpoints = (last - 1) // config.intervals.checkpoint_samples
    return "\n".join(
        [
            describe(Stages.of(config).stages[0], data, world_size),
            f"model {config.model}: at most {total / 1e6:.2f} M parameters, {image / 1e6:.2f} M of "
            f"them in the image tower (a vocabulary of up to {vocabulary:,}); "
            f"{model.image_size} px, {kept} of {model.num_patches} patches kept, "
            f"{model.context_length} text tokens",
            f"memory: {total * _BYTES_A_PARAMETER / 2**20:,.0f} MiB for weights, gradients and "
            "AdamW on one rank without ZeRO, activations not counted",
            f"learning rate {config.optimizer.learning_rate:g} after {warmup:,.1f} steps of "
            "warmup, "
            f"then cosine to 0; {checkpoints:,} checkpoints before the last; output "
            f"{config.output}",
            "throughput: " + measure(config, data, model_config, seconds=seconds).advice(),
        ]
    )
