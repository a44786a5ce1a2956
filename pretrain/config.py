"""The configuration of a pretraining run.

The clock is samples: steps are derived (DESIGN section 5).
"""

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
from pretrain.objectives import objectives

Fraction = Annotated[float, Field(ge=0, lt=1)]
Area = Annotated[float, Field(gt=0, le=1)]


class DataConfig(Config):
    """What is trained on and how it is cut."""

    manifest: str = Field(
        description="a dataset folder with a manifest.json, from `pairmill curate`"
    )
    window_shards: PositiveInt = 16
    num_workers: NonNegativeInt = 1
    max_image_pixels: PositiveInt = 100_000_000
    max_bad_fraction: Fraction = 0.01


class TokenizerConfig(Config):
    """A word-level vocabulary, trained on the captions of the dataset."""

    name: Literal["words"] = "words"
    vocab_size: PositiveInt = 8192
    num_captions: PositiveInt = 10_000_000  # enough whole shards, drawn by hash, to reach this


class AugmentationConfig(Config):
    """RandomResizedCrop: shares of the area and aspect ratios; and the horizontal flip."""

    scale: tuple[Area, Area] = (0.9, 1.0)
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.3333333333333333)
    flip: bool = False

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Self:
        if self.scale[0] > self.scale[1] or self.ratio[0] > self.ratio[1]:
            raise ValueError(
                f"expected [low, high] ranges, got scale {self.scale}, ratio {self.ratio}"
            )
        return self


class ReductionConfig(Config):
    """FLIP: the fraction of patches that is removed from each training image."""

    name: Literal["random"] = "random"
    mask_ratio: Fraction = 0.0


class OptimizerConfig(Config):
    """AdamW with a linear warmup and a cosine to zero; both in samples."""

    name: Literal["adamw"] = "adamw"
    learning_rate: PositiveFloat = 1.0e-3
    weight_decay: NonNegativeFloat = 0.2
    beta1: Fraction = 0.9
    beta2: Fraction = 0.98
    eps: PositiveFloat = 1.0e-6
    warmup_samples: NonNegativeInt = 0
    max_gradient_norm: NonNegativeFloat = 1.0  # 0 turns clipping off
    max_logit_scale: PositiveFloat = 100.0


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


class PretrainConfig(Config):
    """One run: all that changes its result, and the few keys that do not (resume.py lists them)."""

    name: str
    seed: NonNegativeInt = 0
    output: str = Field(
        description="the run folder: checkpoints, metrics.jsonl, tensorboard, config.yaml"
    )
    data: DataConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    model: str = Field(description="a model JSON: a path, a name in configs/models, or open_clip's")
    reduction: ReductionConfig = ReductionConfig()
    objective: Annotated[Variant, Tagged(objectives)]
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    intervals: IntervalConfig = IntervalConfig()
    global_batch_size: PositiveInt
    samples: PositiveInt = Field(description="the budget: samples seen at the end")

    @model_validator(mode="after")
    def _budget_holds_a_batch(self) -> Self:
        if self.samples < self.global_batch_size:
            raise ValueError(
                f"samples {self.samples:,} is less than one global batch of "
                f"{self.global_batch_size:,}"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run; the budget is rounded down to whole batches."""
        return self.samples // self.global_batch_size
