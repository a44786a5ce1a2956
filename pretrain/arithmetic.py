"""The arithmetic of a run in words: batches, steps, passes over the data, learning rate."""

from __future__ import annotations

from pretrain.data.dataset import Sources
from pretrain.data.streaming import Stream
from pretrain.stages import Stage


def describe(stage: Stage, data: Sources | Stream, world_size: int) -> str:
    """Say what a stage is: its batch, its steps, its passes over the data, its learning rate."""
    config, batch, steps = stage.config, stage.batch, stage.num_steps
    ranks = "1 rank" if world_size == 1 else f"{world_size} ranks"
    passes = f"{steps * batch / data.num_samples:.2f} passes over " if data.num_samples else "from "
    name = f"{config.name}, stage {stage.number + 1} {stage.name}" if stage.name else config.name
    return (
        f"{name}: global batch {batch:,} = {ranks} x {batch // world_size:,} samples; "
        f"{steps:,} steps make {steps * batch:,} samples, {passes}{data.describe()}; "
        f"{config.reduction.build()}; ZeRO stage {config.engine.zero_stage}, "
        f"{config.engine.precision}"
    )


def describe_schedule(stage: Stage) -> str:
    """Say how the learning rate of a stage goes."""
    optimizer, batch = stage.config.optimizer, stage.batch
    keys = optimizer.schedule.model_dump(exclude={"name"})
    settings = f" ({', '.join(f'{key} {value:,}' for key, value in keys.items())})" if keys else ""
    last = stage.learning_rate(stage.last_sample - batch)
    return (
        f"learning rate {optimizer.learning_rate:g} after {optimizer.warmup_samples / batch:,.1f} "
        f"steps of warmup, then {optimizer.schedule.name}{settings}, {last:.3g} in the last step"
    )
