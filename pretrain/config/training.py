"""How it is trained: optimizer, engine, intervals."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from configs.registry import Config, Tagged, Variant
from pretrain.clipping import clippings
from pretrain.config.data import Fraction
from pretrain.schedule import schedules


class OptimizerConfig(Config):
    """AdamW, and its learning rate as a function of samples (schedule.py), in each stage anew."""

    name: Literal["adamw", "sgd"] = "adamw"  # sgd: without momentum; betas and eps are AdamW's
    learning_rate: PositiveFloat = 1.0e-3
    weight_decay: NonNegativeFloat = 0.2
    beta1: Fraction = 0.9
    beta2: Fraction = 0.98
    eps: PositiveFloat = 1.0e-6
    warmup_samples: NonNegativeInt = 0
    schedule: Annotated[Variant, Tagged(schedules)] = Field(
        default_factory=lambda: schedules.section("cosine")(name="cosine")
    )
    clipping: Annotated[Variant, Tagged(clippings)] = Field(
        default_factory=lambda: clippings.section("norm")(name="norm")
    )


_OWN_KEYS = {  # of DeepSpeed's JSON: the key here that decides it
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "micro_batch_size",
    "managed_gradient_accumulation": "micro_batch_size",
    "gradient_clipping": "optimizer.clipping",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
    "steps_per_print": "intervals.log_samples",
    "zero_optimization.stage": "engine.zero_stage",
    "bf16.enabled": "engine.precision",
    "bfloat16": "engine.precision",
    "fp16.enabled": "engine.precision",
}


class EngineConfig(Config):
    """DeepSpeed's part.

    `deepspeed` takes any keys of its JSON (https://www.deepspeed.ai/docs/config-json) but those
    that other keys here decide: `deepspeed: {zero_optimization: {overlap_comm: true}}`.
    """

    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    num_threads: PositiveInt | None = None  # torch threads a rank; null: cores / ranks
    activation_checkpointing: bool = False  # blocks are computed again in the backward pass
    compile: bool = False  # torch.compile of the towers' blocks
    deepspeed: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _combination_works(self) -> Self:
        if self.precision != "fp32" and self.zero_stage == 0:
            raise ValueError(
                f"{self.precision} needs zero_stage 1 or more, also on one rank: at stage 0 "
                "DeepSpeed keeps no fp32 master weights that can be read, and its training drifts"
            )
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "compile needs zero_stage 0, 1 or 2: stage 3 gathers weights by hooks that "
                "torch.compile does not see"
            )
        return self

    @model_validator(mode="after")
    def _passed_keys_are_deepspeeds(self) -> Self:
        given = set(self.deepspeed) | {
            f"{section}.{key}"
            for section, keys in self.deepspeed.items()
            if isinstance(keys, dict)
            for key in keys
        }
        own = [f"{key} (set {_OWN_KEYS[key]})" for key in sorted(given & _OWN_KEYS.keys())]
        if own:
            raise ValueError(f"deepspeed: these are decided elsewhere: {', '.join(own)}")
        zero = self.deepspeed.get("zero_optimization", {})
        offload = {k: zero[k] for k in ("offload_optimizer", "offload_param") if zero.get(k)}
        needed = 3 if "offload_param" in offload else 1
        if offload and self.zero_stage < needed:
            raise ValueError(
                f"deepspeed: {' and '.join(offload)} needs zero_stage {needed} or more, got "
                f"{self.zero_stage}"
            )
        if any(section.get("device") == "nvme" for section in offload.values()):
            raise ValueError(
                "deepspeed: offload to nvme is not supported: checkpoints read the optimizer's "
                "state from memory; use device: cpu"
            )
        if zero.get("stage3_param_persistence_threshold", 1) < 1:
            raise ValueError(
                "deepspeed: stage3_param_persistence_threshold is at least 1: the scalars of a "
                "geometry are read outside of the forward pass"
            )
        return self


class StabilityConfig(Config):
    """What a run does where its numbers are not finite, and what it writes down."""

    max_skipped_steps: PositiveInt = 10  # in a row, before it goes back to a checkpoint
    max_rollbacks: NonNegativeInt = 3  # in the whole run, before it ends
    spike_deviations: PositiveFloat = 6.0  # above the running mean: the batch is written down


class IntervalConfig(Config):
    """Intervals, in samples, and how many checkpoints stay."""

    log_samples: PositiveInt = 2_560
    checkpoint_samples: PositiveInt = 1_000_000
    keep_checkpoints: PositiveInt = 2  # the newest ones
    keep_every_samples: PositiveInt | None = None  # and for good the first one in each of these


class EvaluationConfig(Config):
    """Zero-shot and retrieval while training, by all ranks, on the datasets of a suite.

    Numbers go to metrics.jsonl as `evaluation/DATASET/METRIC`. `pairmill evaluate` gives intervals.
    """

    interval_samples: PositiveInt
    suite: str = Field(description="a configuration of `pairmill evaluate`: a path or shipped name")


class WandbConfig(Config):
    """Weights & Biases (`pip install 'pairmill[wandb]'`); its key comes from the environment."""

    project: str = "pairmill"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"  # offline: OUTPUT/wandb, for `wandb sync`


class TelemetryConfig(Config):
    """What the log needs to be told, and where it goes beside metrics.jsonl and TensorBoard."""

    wandb: WandbConfig | None = None

    device_peak_flops: PositiveFloat | None = Field(
        default=None,
        description="dense peak of one device in the run's precision, for `mfu`: H100 bf16 989e+12",
    )


class CheckpointConfig(Config):
    """How checkpoints are written.

    `remote`: a folder of this run alone on any storage that fsspec reaches (`s3://bucket/run`);
    checkpoints are copied there once they are published, and restored from there where the run's
    own folder is empty.
    """

    asynchronous: bool = True  # written while training goes on; false: training waits
    remote: str | None = None


class EmaConfig(Config):
    """An average of the weights beside them, saved as `model_ema/` of each checkpoint.

    Half of the average is of the weights of the last `half_life_samples` samples.
    """

    half_life_samples: PositiveInt
