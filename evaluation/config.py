"""The configuration of an evaluation: which datasets, how to encode, where results go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from configs.registry import Config

Task = Literal["zero_shot", "retrieval"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class DatasetConfig(Config):
    """One evaluation dataset: a folder in the CLIP_benchmark layout (docs/formats.md)."""

    path: Path
    name: Name | None = None  # the folder's name by default
    task: Task | None = None  # by default what the folder's dataset_type.txt says

    @property
    def label(self) -> str:
        """The name under which results are reported."""
        return self.name or self.path.name


class PixelBaselineConfig(Config):
    """The pixel nearest-neighbour baseline and the training images that it looks into."""

    name: Literal["pixel_1nn"] = "pixel_1nn"
    reference: Path  # a folder of WebDataset tars with images and captions


class EvaluateConfig(Config):
    """One evaluation run. Paths are relative to the folder that the command runs in."""

    name: Name
    seed: int = 0
    datasets: Annotated[tuple[DatasetConfig, ...], Field(min_length=1)]
    baseline: PixelBaselineConfig | None = None
    batch_size: PositiveInt = 256
    num_workers: NonNegativeInt = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"  # cuda where there is one, else cpu
    num_bootstrap: Annotated[int, Field(ge=100)] = 1000
    max_undecodable: NonNegativeInt = 0  # images a dataset; they are left out, counted and named
    output: Path | None = None  # runs/NAME/results by default

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        labels = [dataset.label for dataset in self.datasets]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(
                f"two datasets are called {', '.join(twice)}: give each a `name` of its own"
            )
        return self

    @property
    def output_folder(self) -> Path:
        """The folder of results.jsonl and examples.json."""
        return self.output if self.output is not None else Path("runs") / self.name / "results"
