"""How it is trained: optimizer, engine, intervals."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from configs.registry import Config, Tagged, Variant
from pretrain.schedule import schedules

Fraction = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW, and its learning rate as a function of samples (schedule.py), in each stage anew."""

    name: Literal["adamw"] = "adamw"
    learning_rate: PositiveFloat = 1.0e-3
    weight_decay: NonNegativeFloat = 0.2
    beta1: Fraction = 0.9
    beta2: Fraction = 0.98
    eps: PositiveFloat = 1.0e-6
    warmup_samples: NonNegativeInt = 0
    schedule: Annotated[Variant, Tagged(schedules)] = Field(
        default_factory=lambda: schedules.section("cosine")(name="cosine")
    )
    max_gradient_norm: NonNegativeFloat = 1.0  # 0 turns clipping off


class EngineConfig(Config):
    """DeepSpeed's part."""

    zero_stage: Literal[0, 1] = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    num_threads: PositiveInt | None = None  # torch threads a rank; null: cores / ranks

    @model_validator(mode="after")
    def _bf16_needs_master_weights(self) -> Self:
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("bf16 needs zero_stage 1: at stage 0 DeepSpeed's bf16 training drifts")
        return self


class IntervalConfig(Config):
    """Intervals, in samples, and how many checkpoints stay."""

    log_samples: PositiveInt = 2_560
    checkpoint_samples: PositiveInt = 1_000_000
    keep_checkpoints: PositiveInt = 2
