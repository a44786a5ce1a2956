"""Check a run before it is queued: configuration, dataset, batch arithmetic, model size, memory,
and whether data or model will be the limit. The model stands on torch's meta device.
"""

from __future__ import annotations

import os

import torch

from pretrain.arithmetic import counted, describe, describe_schedule, local_batch
from pretrain.build import build_model, check_batch, read_data, stage_model_config
from pretrain.config import PretrainConfig
from pretrain.data.dataset import Sources
from pretrain.data.streaming import Stream
from pretrain.estimate import memory, step_flops, towers
from pretrain.model.clip import Json
from pretrain.stages import Stage, Stages
from pretrain.throughput import measure
from pretrain.wandb_log import check_wandb


def dry_run(config: PretrainConfig, *, seconds: float = 3.0) -> str:
    """Return what a run would do, in words; raise the error that it would end with.

    Tars without an index are indexed, as the run would do. The loader, and where there is a device
    the model, run for some `seconds` each.
    """
    check_wandb(config.telemetry.wandb)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    stages = Stages.of(config)
    data = {stage.number: read_data(stage.config) for stage in stages.stages}
    said = describe_run(config, data, world_size=world_size)
    first = stages.stages[0].config
    measured = measure(first, data[0], _model_config(first), seconds=seconds)
    return "\n".join([*said, "throughput: " + measured.advice()])


def describe_run(
    config: PretrainConfig, data: dict[int, Sources | Stream], *, world_size: int
) -> list[str]:
    """Return the arithmetic, the sizes and the memory of every stage, a line each; `data` by stage.

    Nothing is read or allocated. Raises ConfigError.
    """
    stages = Stages.of(config)
    said = []
    flops = 0
    for stage in stages.stages:
        check_batch(stage.config, world_size)
        said.append(describe(stage, data[stage.number], world_size))
        said += _sizes(stage, world_size)
        said.append(describe_schedule(stage))
        samples = stage.last_sample - stage.first_sample
        flops += samples * step_flops(stage, _model_config(stage.config))
    checkpoints = (stages.num_samples - 1) // config.intervals.checkpoint_samples
    said.append(
        f"in all {stages.num_steps:,} steps, {stages.num_samples:,} samples, {flops:.3g} FLOPs "
        f"(three forward passes of both towers); "
        f"{counted(checkpoints + len(stages.stages), 'checkpoint')}; output {config.output}"
    )
    return said


def _model_config(config: PretrainConfig) -> Json:
    model = stage_model_config(config)
    if config.tokenizer.name == "words":  # not trained yet: it can have no more than this
        model["text_cfg"]["vocab_size"] = config.tokenizer.vocab_size
    return model


def _sizes(stage: Stage, world_size: int) -> list[str]:
    config = stage.config
    model_config = _model_config(config)
    with torch.device("meta"):
        model = build_model(config, model_config, None)
    image = sum(p.numel() for p in model.clip.visual.parameters())
    total = sum(p.numel() for p in model.parameters())
    kept = config.reduction.build().num_kept(model.patch_rows)
    image_tower, text_tower = towers(stage, model_config)
    vocabulary = model.config["text_cfg"]["vocab_size"]
    micro_batch, _ = local_batch(stage, world_size)
    bytes_ = memory(
        stage, model_config, num_parameters=total, world_size=world_size, micro_batch=micro_batch
    )
    mib = {
        name: f"{getattr(bytes_, name) / 2**20:,.0f}"
        for name in ("total", "weights", "gradients", "optimizer", "activations")
    }
    return [
        f"model {config.model}: at most {total / 1e6:.2f} M parameters, {image / 1e6:.2f} M of "
        f"them in the image tower (a vocabulary of up to {vocabulary:,}); "
        f"{model.image_size} px, {kept} of {model.num_patches} patches kept, "
        f"{text_tower.tokens} of {model.context_length} text tokens; "
        f"{(image_tower.flops + text_tower.flops) / 1e9:.3g} GFLOPs forward a sample",
        f"memory: about {mib['total']} MiB on a rank: {mib['weights']} of weights, "
        f"{mib['gradients']} of gradients, {mib['optimizer']} of AdamW's state, "
        f"{mib['activations']} of activations for {micro_batch:,} samples at once (not counted: "
        "communication buffers, kernels' workspaces, what the allocator loses)",
    ]
