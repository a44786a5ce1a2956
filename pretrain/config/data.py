"""What is trained on: datasets, captions, pictures and where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from configs.registry import Config

Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Area = Annotated[float, Field(gt=0, le=1)]
HueShift = Annotated[float, Field(ge=0, le=0.5)]


class AugmentationConfig(Config):
    """What is cut out of a picture and how it is changed (pretrain/data/augment.py).

    `crop`: `random` is RandomResizedCrop with shares of the area in `scale` and aspects in `ratio`,
    `center` the largest centred square, `squash` the whole picture whatever its shape, `enclosing`
    a random box that holds the crops of `data.views`, for attentive masking.
    """

    crop: Literal["random", "center", "squash", "enclosing"] = "random"
    scale: tuple[Area, Area] = (0.9, 1.0)
    ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.3333333333333333)
    flip: bool = False
    jitter: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat, HueShift] = (0, 0, 0, 0)
    jitter_probability: Probability = 0.0  # brightness, contrast, saturation, hue above
    gray_probability: Probability = 0.0
    blur_probability: Probability = 0.0
    blur_sigma: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)  # pixels of the resized picture

    @model_validator(mode="after")
    def _ranges_ascend(self) -> Self:
        ranges = {name: getattr(self, name) for name in ("scale", "ratio", "blur_sigma")}
        if any(low > high for low, high in ranges.values()):
            got = ", ".join(f"{name} {range_}" for name, range_ in ranges.items())
            raise ValueError(f"expected [low, high] ranges, got {got}")
        if self.crop == "enclosing" and self.flip:
            raise ValueError("the enclosing crop is not flipped: the views in it may be")
        if self.jitter_probability and not any(self.jitter):
            raise ValueError("jitter_probability without strengths: set jitter, [b, c, s, h]")
        return self


class SourceConfig(Config):
    """One dataset of a mixture; its part of every batch is in proportion to its weight."""

    manifest: str
    weight: PositiveFloat = 1.0


class CaptionConfig(Config):
    """Which captions are trained on, by weight, and how they are framed.

    `places`: where the captions of a sample are (`txt`, `json:rewrites`, `txt|json:caption`), each
    with the weight it is drawn by; empty: the captions of the index. `{caption}` in `templates`.
    """

    places: dict[str, PositiveFloat] = Field(default_factory=dict)
    templates: tuple[str, ...] = ("{caption}",)
    negative: str | None = None  # the place of a hard negative, for the objectives that want one

    @model_validator(mode="after")
    def _templates_hold_a_caption(self) -> Self:
        lacking = [t for t in self.templates if "{caption}" not in t]
        if lacking or not self.templates:
            raise ValueError(f"every template holds {{caption}}; these do not: {lacking}")
        return self


class RemoteConfig(Config):
    """The copies of remote shards on each node. Credentials come from the environment."""

    folder: str = "~/.cache/pairmill"
    cache_bytes: PositiveInt = 100_000_000_000
    retries: NonNegativeInt = 8
    num_threads: PositiveInt = 4  # that fetch the next window ahead, in each worker

    @property
    def path(self) -> Path:
        """The folder, ~ made out where it is used: a resolved config names no home."""
        return Path(self.folder).expanduser()


class DataConfig(Config):
    """What is trained on and how it is read.

    `source: indexed` reads a manifest, or a mixture of them, in an order that can be resumed to the
    sample. `source: streaming` is webdataset's pipeline over `urls`; it cannot.
    """

    source: Literal["indexed", "streaming"] = "indexed"
    manifest: str | None = Field(
        default=None,
        description="a dataset folder, local or remote, from `pairmill curate` or `pairmill index`;"
        " a folder or a brace pattern of tars is indexed on first use",
    )
    mixture: tuple[SourceConfig, ...] = ()
    urls: tuple[str, ...] = ()
    allow_pipes: bool = False  # `pipe:COMMAND` in urls runs a shell command
    window_shards: PositiveInt = 16
    captions: CaptionConfig = CaptionConfig()
    views: tuple[AugmentationConfig, ...] = ()  # further augmented views of each image
    negative_image: str | None = None  # the extension of a hard negative image
    remote: RemoteConfig = RemoteConfig()
    num_workers: NonNegativeInt = 1
    max_image_pixels: PositiveInt = 100_000_000
    max_bad_fraction: Fraction = 0.01

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [k for k in ("manifest", "mixture", "urls") if getattr(self, k)]
        wanted = ["urls"] if self.source == "streaming" else ["manifest", "mixture"]
        if len(given) != 1 or given[0] not in wanted:
            raise ValueError(
                f"source: {self.source} takes {' or '.join(wanted)}, got "
                f"{' and '.join(given) or 'none of them'}"
            )
        if self.source == "streaming" and (self.captions.negative or self.negative_image):
            raise ValueError("hard negatives need source: indexed")
        pipes = [url for url in self.urls if url.startswith("pipe:")]
        if pipes and not self.allow_pipes:
            raise ValueError(
                f"urls: {pipes[0]!r} runs a shell command; data.allow_pipes=true lets it"
            )
        return self

    @property
    def wanted(self) -> tuple[SourceConfig, ...]:
        """The manifests, with their weights."""
        return self.mixture or (SourceConfig(manifest=self.manifest or ""),)
