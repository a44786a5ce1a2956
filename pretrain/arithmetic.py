"""The arithmetic of a run in words: batches, steps, passes over the data, learning rate."""

from __future__ import annotations

import os

from pretrain.data.dataset import Sources
from pretrain.data.streaming import Stream
from pretrain.stages import Stage


def local_batch(stage: Stage, world_size: int) -> tuple[int, int]:
    """Return a rank's micro-batch and how many of them it accumulates a step."""
    local = stage.batch // world_size
    micro = min(stage.config.micro_batch_size or local, local)
    return micro, -(-local // micro)


def describe(stage: Stage, data: Sources | Stream, world_size: int) -> str:
    """Say what a stage is: its batch, its steps, its passes over the data."""
    config, batch, steps = stage.config, stage.batch, stage.num_steps
    a_node = min(world_size, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))
    micro, accumulated = local_batch(stage, world_size)
    factors = [counted(world_size // a_node, "node")] if a_node < world_size else []
    factors += [counted(a_node, "rank"), f"{micro:,} samples"]
    factors += [f"{accumulated} micro-batches"] if accumulated > 1 else []
    if batch != world_size * micro * accumulated:
        factors[-1] += " (the last one smaller)"
    passes = f"{steps * batch / data.num_samples:.2f} passes over " if data.num_samples else "from "
    name = f"{config.name}, stage {stage.number + 1} {stage.name}" if stage.name else config.name
    return (
        f"{name}: global batch {batch:,} = {' x '.join(factors)}; "
        f"{steps:,} steps make {steps * batch:,} samples, {passes}{data.describe()}; "
        f"{config.reduction.build()}; ZeRO stage {config.engine.zero_stage}, "
        f"{config.engine.precision}"
    )


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural but for 1."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def never_at_peak(stage: Stage) -> str | None:
    """Say that a stage ends within its warmup; None where it does not."""
    optimizer, batch = stage.config.optimizer, stage.batch
    if optimizer.warmup_samples <= stage.num_steps * batch:
        return None
    last = stage.learning_rate(stage.last_sample - batch)
    return (
        f"WARNING: the warmup of {optimizer.warmup_samples / batch:,.1f} steps is longer than the "
        f"{counted(stage.num_steps, 'step')} that there are: the learning rate ends at {last:.3g} "
        f"and never comes to {optimizer.learning_rate:g}. Lower optimizer.warmup_samples "
        f"({optimizer.warmup_samples:,}), or raise samples ({stage.config.samples:,})."
    )


def describe_schedule(stage: Stage) -> str:
    """Say how the learning rate of a stage goes."""
    warning = never_at_peak(stage)
    if warning is not None:
        return warning
    optimizer, batch = stage.config.optimizer, stage.batch
    keys = optimizer.schedule.model_dump(exclude={"name"})
    settings = f" ({', '.join(f'{key} {value:,}' for key, value in keys.items())})" if keys else ""
    last = stage.learning_rate(stage.last_sample - batch)
    return (
        f"learning rate {optimizer.learning_rate:g} after {optimizer.warmup_samples / batch:,.1f} "
        f"steps of warmup, then {optimizer.schedule.name}{settings}, {last:.3g} in the last step"
    )
