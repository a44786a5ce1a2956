"""One stage of a run: what it changes of the run's sections."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field, PositiveInt

from configs.registry import Config

# What a stage may change; every other key belongs to the run as a whole.
STAGE_KEYS = (
    "global_batch_size", "micro_batch_size", "image_size", "image_positions", "context_length",
    "reduction", "text_reduction", "augmentation", "objective", "teacher", "logit", "towers",
    "optimizer", "engine", "stability", "data",
)  # fmt: skip
# What may change where AdamW's moments are kept: nothing that a moment belongs to.
KEPT_MAY_CHANGE = {
    "samples", "global_batch_size", "reduction", "text_reduction", "augmentation", "data",
    "objective", "optimizer.learning_rate", "optimizer.warmup_samples", "optimizer.schedule",
}  # fmt: skip


class StageConfig(Config):
    """A stage: its budget, and the sections that it changes (merged into the run's, key by key).

    stages:
      - {name: small, samples: 12_800_000_000, image_size: 84}
      - {name: tune, samples: 512_000_000, optimizer: {learning_rate: 5.12e-5}}

    A stage starts with the weights of the one before. AdamW's moments start afresh, as in the
    published recipes, unless `keep_optimizer`; that needs the same tensors in both stages.
    """

    model_config = ConfigDict(extra="allow")

    name: str
    samples: PositiveInt
    keep_optimizer: bool = Field(default=False, description="go on with the moments of AdamW")

    @property
    def changes(self) -> dict[str, Any]:
        """The keys of the run that this stage changes, as they are written."""
        return dict(self.model_extra or {})
