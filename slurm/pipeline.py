"""A chain of jobs in one file: curate, pretrain, evaluate, each after the one before ended well.

configs/slurm/demo.yaml is one. A stage that is left out was done before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from configs.registry import Config
from slurm.site import Flags, Kind

ORDER: tuple[Kind, ...] = ("curate", "pretrain", "evaluate")


class StageConfig(Config):
    """One job of the chain."""

    config: str = Field(description="as for the command of that name")
    overrides: tuple[str, ...] = ()  # key.path=value
    sbatch: Flags = Field(default_factory=dict)  # over the site's: nodes, time, array, ...


class EvaluateStageConfig(StageConfig):
    """The last job. Its queue of checkpoints is by default the chain's pretraining run."""

    checkpoints: tuple[str, ...] = ()


class PipelineConfig(Config):
    """The chain."""

    name: str
    output: Path = Field(description="where the chain itself is recorded; not a stage's folder")
    curate: StageConfig | None = None
    pretrain: StageConfig | None = None
    evaluate: EvaluateStageConfig | None = None

    @model_validator(mode="after")
    def _some_stage(self) -> Self:
        if not self.stages:
            raise ValueError(f"expected at least one of {', '.join(ORDER)}")
        if self.evaluate and not self.evaluate.checkpoints and not self.pretrain:
            raise ValueError("evaluate.checkpoints: needed where the chain does not pretrain")
        return self

    @property
    def stages(self) -> list[tuple[Kind, StageConfig]]:
        """The stages that are there, in their order."""
        found = ((kind, getattr(self, kind)) for kind in ORDER)
        return [(kind, stage) for kind, stage in found if stage is not None]
