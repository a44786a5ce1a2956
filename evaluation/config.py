"""The configuration of an evaluation: which datasets, which methods, how to encode, where to.

A suite is a YAML list of datasets below one `root`; `configs/evaluation` ships the known ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from configs.registry import Config, Tagged, Variant
from evaluation.methods import catalogue
from evaluation.task import Sha256, Task

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]
MethodSection = Annotated[Variant, Tagged(catalogue.methods)]


class DatasetConfig(Config):
    """One evaluation dataset: a folder in the CLIP_benchmark layout, or a YAML description.

    Both are in docs/formats.md. A path with `://` is a folder on remote storage (fsspec).
    """

    path: str
    name: Name | None = None  # the path's last part by default
    title: str | None = None  # as published tables call it
    task: Task | None = None  # by default what the dataset says of itself
    methods: tuple[MethodSection, ...] | None = None  # instead of the suite's
    main_metric: str | None = None  # METHOD/METRIC; by default that of the task
    random_score: float | None = None  # of the main metric, where it is published
    checksums: dict[str, Sha256] = Field(
        default_factory=dict
    )  # sha256 of files, by path below the dataset's folder
    groups: dict[str, str] = Field(
        default_factory=dict
    )  # of a folder's images, by where they stand: npy:0, json:region
    tags: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name under which results are reported."""
        return self.name or Path(self.path).name.removesuffix(".yaml")


class PixelBaselineConfig(Config):
    """The pixel nearest-neighbour baseline and the training images that it looks into."""

    name: Literal["pixel_1nn"] = "pixel_1nn"
    reference: Path  # a folder of WebDataset tars with images and captions


class WiseFtConfig(Config):
    """WiSE-FT: also evaluate models between a zero-shot one and each checkpoint."""

    zero: str  # the model before fine-tuning
    alphas: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (0.5,)


class EvaluateConfig(Config):
    """One evaluation run. Paths are relative to the folder that the command runs in."""

    name: Name
    seed: int = 0
    root: str | None = None  # the folder (or URL) that relative dataset paths start from
    datasets: Annotated[tuple[DatasetConfig, ...], Field(min_length=1)]
    absent: Literal["error", "report"] = "error"  # a dataset that is not there
    methods: tuple[MethodSection, ...] | None = None  # None: zero-shot or retrieval, by task
    average: str | None = None  # the name of the mean over all datasets' main metrics
    baseline: PixelBaselineConfig | None = None
    weights: Literal["raw", "ema"] = "raw"
    wise_ft: WiseFtConfig | None = None
    logit_scale: Annotated[float, Field(gt=0)] | Literal["model"] = "model"
    batch_size: PositiveInt = 256
    num_workers: NonNegativeInt = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"  # cuda where there is one, else cpu
    num_bootstrap: Annotated[int, Field(ge=100)] = 1000
    max_undecodable: NonNegativeInt = 0  # images a dataset; they are left out, counted and named
    predictions: bool = False  # also write what each sample got
    cache: Path = Path("runs/features")  # computed features, shared by all runs
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

    def place(self, dataset: DatasetConfig) -> str:
        """Return the dataset's path or URL."""
        path = dataset.path
        if self.root is None or "://" in path or Path(path).is_absolute():
            return path
        return f"{self.root.rstrip('/')}/{path}"

    def method_sections(self, dataset: DatasetConfig, task: Task) -> tuple[Variant, ...]:
        """Return the methods to run on a dataset."""
        chosen = dataset.methods if dataset.methods is not None else self.methods
        if chosen is not None:
            return chosen
        return (catalogue.methods.section(task)(name=task),)

    def result_keys(self) -> dict[str, Any]:
        """Return the keys that can change a result; not where it goes or how fast it comes."""
        kept = ("seed", "weights", "logit_scale", "precision", "num_bootstrap", "max_undecodable")
        return {key: getattr(self, key) for key in kept}
