"""The configuration of `pairmill score`; configs/score/demo.yaml is one."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, SerializeAsAny, field_validator, model_validator

from configs.registry import Config, Tagged, Variant
from curation.captions import DEFAULT_PLACES
from curation.config import EngineConfig, Name, SourceConfig
from curation.index import SCHEMA
from curation.scan import DEFAULT_MAX_IMAGE_PIXELS
from tools.score.base import Score
from tools.score.scores import scores

_OF_SCANS = ("image_hash", "decodable", "dhash", "phash", "colors")


class ModelConfig(Config):
    """The model that judges: a run or checkpoint of ours, an open_clip name/tag or folder."""

    checkpoint: str
    weights: Literal["raw", "ema"] = "raw"
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"  # cuda where there is one, else cpu


class ResourcesConfig(Config):
    """What each actor holds of the cluster."""

    num_cpus: PositiveInt = 1  # threads that decode; on a CPU also those of the model
    num_gpus: Annotated[float, Field(ge=0)] = 0.0


class ScoreConfig(Config):
    """Everything that a scoring job needs to know. Paths are relative to the current folder."""

    name: Name
    # What to score: a dataset folder (`pairmill curate`, `pairmill index`), or sources as a
    # curation reads them, with the same index_dir, captions and max_image_pixels.
    manifest: str | None = None
    sources: tuple[SourceConfig, ...] = ()
    index_dir: str | None = None
    captions: Annotated[tuple[str, ...], Field(min_length=1)] = DEFAULT_PLACES
    max_image_pixels: PositiveInt = DEFAULT_MAX_IMAGE_PIXELS
    model: ModelConfig | None = None
    scores: Annotated[
        tuple[Annotated[SerializeAsAny[Variant], Tagged(scores)], ...], Field(min_length=1)
    ]
    replace: bool = False  # make scores anew that another model or setting made
    batch_size: PositiveInt = 256
    actors: PositiveInt | None = None  # as many as the cluster has room for
    resources: ResourcesConfig = ResourcesConfig()
    engine: EngineConfig = EngineConfig()

    @field_validator("sources")
    @classmethod
    def _unique(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        twice = [name for name, n in Counter(s.name for s in sources).items() if n > 1]
        if twice:
            raise ValueError(f"two sources are called {twice[0]!r}; a name must be unique")
        return sources

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        wrong = []
        if (self.manifest is None) == (not self.sources):
            wrong.append("give either `manifest` (a dataset folder) or `sources`")
        built: list[Score] = [section.build() for section in self.scores]
        names = Counter(name for score in built for name in sorted(score.names))
        wrong += [
            f"two scores make {name!r}: name one of them" for name, n in names.items() if n > 1
        ]
        taken = sorted({*SCHEMA.names, *_OF_SCANS} & set(names))
        wrong += [f"{name!r} is a column that every index has or a scan makes" for name in taken]
        judged = [s.name for s, b in zip(self.scores, built, strict=True) if b.uses_model]
        if judged and self.model is None:
            wrong.append(f"{', '.join(judged)} need a model: give `model.checkpoint`")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self
