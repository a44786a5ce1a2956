"""The configuration of a pretraining run.

The clock is samples: steps are derived (DESIGN section 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from configs.registry import Config, Tagged, Variant
from pretrain.model.logits import Logits
from pretrain.model.similarity import similarities
from pretrain.objectives import Term, Total, objectives

Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Area = Annotated[float, Field(gt=0, le=1)]
HueShift = Annotated[float, Field(ge=0, le=0.5)]


class AugmentationConfig(Config):
    """What is cut out of a picture and how it is changed (pretrain/data/augment.py).

    `crop`: `random` is RandomResizedCrop with shares of the area in `scale` and aspects in `ratio`,
    `center` the largest centred square, `squash` the whole picture whatever its shape.
    """

    crop: Literal["random", "center", "squash"] = "random"
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


class TokenizerConfig(Config):
    """How captions become ids.

    `words`: a word-level vocabulary, trained on the captions of the dataset. `clip`: CLIP's
    byte-pair encoding, open_clip's ids. `file`: any Hugging Face tokenizer.json.
    """

    name: Literal["words", "clip", "file"] = "words"
    vocab_size: PositiveInt = 8192  # words
    num_captions: PositiveInt = 10_000_000  # words: enough whole shards to reach this
    path: str | None = None  # file
    end_token: str | None = None  # file: where it does not end texts by itself
    pad_token: str | None = None  # file: where it does not pad

    @model_validator(mode="after")
    def _keys_fit(self) -> Self:
        keys = {"words": ("vocab_size", "num_captions"), "clip": (),
                "file": ("path", "end_token", "pad_token")}  # fmt: skip
        given = {k for k in self.model_fields_set - {"name"} if getattr(self, k) is not None}
        defaults = {k for k in given if getattr(self, k) == type(self).model_fields[k].default}
        foreign = sorted(given - set(keys[self.name]) - defaults)
        if foreign:
            raise ValueError(f"tokenizer {self.name} takes no {', '.join(foreign)}")
        if self.name == "file" and self.path is None:
            raise ValueError("tokenizer file needs a path")
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


class LogitConfig(Config):
    """logit = scale * score + bias. null: as the papers of objective and similarity start it."""

    scale: PositiveFloat | None = None
    bias: float | None = None
    learnable: bool | None = None
    min_scale: NonNegativeFloat = 0.0  # open_clip holds it at 1 or more; EuCLIP may start below
    max_scale: PositiveFloat = 100.0


class TeacherConfig(Config):
    """The frozen teacher of the distillation objectives."""

    checkpoint: str = Field(description="a pairmill run, checkpoint or model folder; cosine")


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


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, Mapping | Term) else value


Objectives = Annotated[tuple[Annotated[Term, Tagged(objectives)], ...], BeforeValidator(_as_list)]


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
    similarity: Annotated[Variant, Tagged(similarities)] = Field(
        default_factory=lambda: similarities.section("cosine")(name="cosine")
    )
    objective: Objectives = Field(description="one section, or a list of them with weights")
    logit: LogitConfig = LogitConfig()
    teacher: TeacherConfig | None = None
    view_head_width: PositiveInt = Field(
        default=4096, description="of the projection of augmented views, for simclr (SLIP)"
    )
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
        if self.data.source == "streaming" and self.tokenizer.name == "words":
            raise ValueError(
                "tokenizer words learns its vocabulary from the index, which source: streaming has "
                "not; choose tokenizer clip or file"
            )
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> Self:
        if not self.objective:
            raise ValueError("objective: expected a section or a list of them, got an empty list")
        for term in self.objective:
            allowed = term.build().geometries
            if allowed and self.similarity.name not in allowed:
                raise ValueError(
                    f"objective {term.name} is defined in {' and '.join(allowed)} geometry, got "
                    f"similarity.name={self.similarity.name}"
                )
        needs = self.total.needs
        if "views" in needs and len(self.data.views) != 2:
            raise ValueError(
                f"simclr compares two augmented views, got {len(self.data.views)}: set data.views "
                "to two augmentations"
            )
        if "negative_text" in needs and self.data.captions.negative is None:
            raise ValueError("the objective needs hard negative texts: set data.captions.negative")
        if "negative_image" in needs and self.data.negative_image is None:
            raise ValueError("the objective needs hard negative images: set data.negative_image")
        if ("teacher" in needs) != (self.teacher is not None):
            raise ValueError(
                "a teacher and an objective that learns from one (distill_...) go together; got "
                f"teacher {'without' if self.teacher else 'missing for'} such an objective"
            )
        return self

    @property
    def total(self) -> Total:
        """The weighted sum of the objectives."""
        return Total(self.objective)

    def logits(self, geometry_scale: float) -> Logits:
        """Return where scale and bias start: as set, else the objective's, else the geometry's."""
        paper, own = self.total.logits or Logits(geometry_scale), self.logit
        return Logits(
            paper.scale if own.scale is None else own.scale,
            paper.bias if own.bias is None else own.bias,
            paper.learnable if own.learnable is None else own.learnable,
        )

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run; the budget is rounded down to whole batches."""
        return self.samples // self.global_batch_size
