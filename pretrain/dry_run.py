"""Check a run before it is queued: configuration, dataset, batch arithmetic, model size."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from curation.manifest import read_manifest
from pretrain.build import check_batch
from pretrain.config import PretrainConfig
from pretrain.model.clip import ClipModel, read_model_config
from pretrain.reduction.image import num_kept_patches
from pretrain.train import describe

_BYTES_A_PARAMETER = 16  # fp32 weight and gradient, two AdamW moments


def dry_run(config: PretrainConfig) -> str:
    """Return what a run would do, in words; raise the error that it would end with."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_batch(config, world_size)
    manifest = read_manifest(Path(config.data.manifest))
    model_config = read_model_config(config.model)
    with torch.device("meta"):
        model = ClipModel(model_config)
    image = sum(p.numel() for p in model.clip.visual.parameters())
    total = sum(p.numel() for p in model.parameters())
    kept = num_kept_patches(model.num_patches, config.reduction.mask_ratio)
    warmup = config.optimizer.warmup_samples / config.global_batch_size
    checkpoints = config.samples // config.intervals.checkpoint_samples
    return "\n".join(
        [
            describe(config, manifest, world_size),
            f"model {config.model}: {total / 1e6:.2f} M parameters ({image / 1e6:.2f} M image "
            "tower, the "
            "rest text tower with a vocabulary of "
            f"{model_config['text_cfg'].get('vocab_size', 49408):,} "
            "until the tokenizer is trained), "
            f"{model.image_size} px, {kept} of {model.num_patches} patches kept, "
            f"{model.context_length} text tokens",
            f"memory: {total * _BYTES_A_PARAMETER / 2**20:,.0f} MiB for weights, gradients and "
            "AdamW "
            "on one rank without ZeRO, activations not counted",
            f"learning rate {config.optimizer.learning_rate:g} after {warmup:,.1f} steps of "
            "warmup, then "
            f"cosine to 0; {checkpoints:,} checkpoints before the last; output {config.output}",
        ]
    )
