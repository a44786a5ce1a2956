"""The configuration of a pretraining run.

The clock is samples: steps are derived (DESIGN section 5).
"""

from pretrain.config.data import (
    AugmentationConfig,
    CaptionConfig,
    DataConfig,
    RemoteConfig,
    SourceConfig,
)
from pretrain.config.model import (
    LogitConfig,
    TeacherConfig,
    TokenizerConfig,
    TowerConfig,
    TowersConfig,
)
from pretrain.config.run import Objectives, PretrainConfig
from pretrain.config.stage import StageConfig
from pretrain.config.training import (
    CheckpointConfig,
    EmaConfig,
    EngineConfig,
    EvaluationConfig,
    IntervalConfig,
    OptimizerConfig,
    StabilityConfig,
    TelemetryConfig,
    WandbConfig,
)

__all__ = [
    "AugmentationConfig",
    "CaptionConfig",
    "CheckpointConfig",
    "DataConfig",
    "EmaConfig",
    "EngineConfig",
    "EvaluationConfig",
    "IntervalConfig",
    "LogitConfig",
    "Objectives",
    "OptimizerConfig",
    "PretrainConfig",
    "RemoteConfig",
    "SourceConfig",
    "StabilityConfig",
    "StageConfig",
    "TeacherConfig",
    "TelemetryConfig",
    "TokenizerConfig",
    "TowerConfig",
    "TowersConfig",
    "WandbConfig",
]
