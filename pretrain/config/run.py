"""One run: the sections put together, and what must hold between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from configs.errors import did_you_mean
from configs.load import merge
from configs.registry import Config, Tagged, Variant
from pretrain.config.data import AugmentationConfig, DataConfig
from pretrain.config.model import (
    LogitConfig,
    TeacherConfig,
    TokenizerConfig,
    TowersConfig,
)
from pretrain.config.stage import KEPT_MAY_CHANGE, STAGE_KEYS, StageConfig
from pretrain.config.training import (
    CheckpointConfig,
    EmaConfig,
    EngineConfig,
    EvaluationConfig,
    IntervalConfig,
    OptimizerConfig,
    StabilityConfig,
    TelemetryConfig,
)
from pretrain.model.logits import Logits
from pretrain.model.similarity import similarities
from pretrain.objectives import Term, Total, objectives
from pretrain.reduction.image import image_reductions
from pretrain.reduction.text import TextReductionSection, text_reductions


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, Mapping | Term) else value


def _random_by_default(value: Any) -> Any:
    return {"name": "random", **value} if isinstance(value, Mapping) else value


def _truncate() -> TextReductionSection:
    section = text_reductions.section("truncate")(name="truncate")
    assert isinstance(section, TextReductionSection)
    return section


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
    image_size: PositiveInt | None = Field(default=None, description="pixels; null: the model's")
    image_positions: Literal["learnable", "sin_cos_2d"] | None = Field(
        default=None, description="of the image tower; null: the model's"
    )
    context_length: PositiveInt | None = Field(
        default=None, description="tokens of a text; null: the model's"
    )
    reduction: Annotated[
        Annotated[Variant, Tagged(image_reductions)], BeforeValidator(_random_by_default)
    ] = Field(
        default_factory=lambda: image_reductions.section("random")(name="random"),
        description="which patches of each training image stay",
    )
    text_reduction: Annotated[TextReductionSection, Tagged(text_reductions)] = Field(
        default_factory=_truncate,
        description="which tokens of each training text stay",
    )
    similarity: Annotated[Variant, Tagged(similarities)] = Field(
        default_factory=lambda: similarities.section("cosine")(name="cosine")
    )
    objective: Objectives = Field(description="one section, or a list of them with weights")
    logit: LogitConfig = LogitConfig()
    teacher: TeacherConfig | None = None
    towers: TowersConfig = TowersConfig()
    view_head_width: PositiveInt = Field(
        default=4096, description="of the projection of augmented views, for simclr (SLIP)"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    stability: StabilityConfig = StabilityConfig()
    ema: EmaConfig | None = None
    intervals: IntervalConfig = IntervalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    evaluation: EvaluationConfig | None = None
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = Field(
        default=None,
        description="samples that a rank encodes at once; null: all of its part of the batch",
    )
    samples: PositiveInt = Field(
        description="the budget: samples seen at the end; with stages, their sum by default"
    )
    stages: tuple[StageConfig, ...] = Field(
        default=(), description="one after another; empty: the whole run is one stage"
    )

    @model_validator(mode="before")
    @classmethod
    def _budget_of_stages(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not data.get("stages") or data.get("samples"):
            return data
        parts = [s.get("samples") if isinstance(s, Mapping) else None for s in data["stages"]]
        numbers = [part for part in parts if isinstance(part, int)]
        return {**data, "samples": sum(numbers)} if len(numbers) == len(parts) else data

    @model_validator(mode="wrap")
    @classmethod
    def _stages_hold(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Say every problem of every stage, at its own place."""
        config = handler(data)
        problems: list[InitErrorDetails] = []
        for number, stage in enumerate(config.stages):
            for key in sorted(stage.changes.keys() - set(STAGE_KEYS)):
                message = (
                    f"a stage cannot change this{did_you_mean(key, STAGE_KEYS)} It may change: "
                    f"{', '.join(STAGE_KEYS)}"
                )
                kind: Any = PydanticCustomError("stage_key", "{message}", {"message": message})
                got = stage.changes[key]
                problems.append({"type": kind, "loc": ("stages", number, key), "input": got})
            try:
                config.in_stage(number)
            except ValidationError as error:
                for problem in map(cls._detail, error.errors(include_url=False)):
                    place = ("stages", number, *problem.get("loc", ()))
                    problems.append({**problem, "loc": place})
        for number in range(1, len(config.stages)) if not problems else ():
            changed = config.changed_for_kept_optimizer(number)
            if changed:
                message = (
                    f"keep_optimizer: {', '.join(changed)} changes in this stage, and what the "
                    "optimizer holds (groups, AdamW's moments) with it; leave keep_optimizer out "
                    "(it starts afresh)"
                )
                custom: Any = PydanticCustomError("stage_key", "{message}", {"message": message})
                place = ("stages", number, "keep_optimizer")
                problems.append({"type": custom, "loc": place, "input": True})
        if problems:
            raise ValidationError.from_exception_data(cls.__name__, problems)
        return config

    def in_stage(self, number: int) -> Self:
        """Return the configuration of one stage as a run of its own: its changes merged in.

        Raises pydantic's ValidationError where they do not fit.
        """
        stage = self.stages[number]
        whole = self.model_dump(mode="json", exclude={"stages"})
        changes = {key: stage.changes[key] for key in STAGE_KEYS if key in stage.changes}
        merged = merge(whole, {**changes, "samples": stage.samples}, is_section=False)
        return type(self).model_validate(merged)

    def changed_for_kept_optimizer(self, number: int) -> list[str]:
        """Return the keys that keep a stage from going on with the optimizer before it."""
        if not self.stages[number].keep_optimizer:
            return []
        before, now = self.in_stage(number - 1), self.in_stage(number)
        changed = [] if before.total.needs == now.total.needs else ["objective"]
        stored, trees = before.model_dump(), now.model_dump()
        for key in trees:
            pairs = {key: (stored[key], trees[key])}
            if key == "optimizer":
                pairs = {f"{key}.{k}": (stored[key][k], v) for k, v in trees[key].items()}
            changed += [k for k, (a, b) in pairs.items() if a != b and k not in KEPT_MAY_CHANGE]
        if now.towers.have_rates and before.optimizer.learning_rate != now.optimizer.learning_rate:
            # A group's rate is kept as its ratio to the base, with which it would move.
            changed.append("optimizer.learning_rate beside towers.*.learning_rate")
        kinds = {before.reduction.name, now.reduction.name}
        if "attentive" in kinds and before.reduction != now.reduction:
            changed.append("reduction")
        return changed

    @model_validator(mode="after")
    def _budget_holds_a_batch(self) -> Self:
        if not self.stages and self.samples < self.global_batch_size:
            raise ValueError(
                f"samples {self.samples:,} is less than one global batch of "
                f"{self.global_batch_size:,}"
            )
        total = sum(stage.samples for stage in self.stages)
        if self.stages and total != self.samples:
            raise ValueError(
                f"samples {self.samples:,} is not the sum of the stages, {total:,}: leave it out "
                "(samples: null), or change the stages"
            )
        if self.stages and self.stages[0].keep_optimizer:
            raise ValueError("the first stage has no optimizer to keep: stages.0.keep_optimizer")
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
        if needs & {"second_image", "mean_target"} and self.reduction.name != "attentive":
            raise ValueError(
                "clip_views and byol compare views that a mean teacher has masked: set "
                "reduction: {name: attentive}"
            )
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

    @model_validator(mode="after")
    def _attentive_masking_fits(self) -> Self:
        crops = [view.crop for view in self.data.views]
        is_attentive = self.reduction.name == "attentive"
        if is_attentive != (self.augmentation.crop == "enclosing") or "enclosing" in crops:
            raise ValueError(
                "reduction attentive and augmentation.crop: enclosing go together, and no view is "
                f"enclosing; got reduction {self.reduction.name}, augmentation.crop "
                f"{self.augmentation.crop}, views with crops {crops}"
            )
        if is_attentive and len(crops) not in ((2,) if self.total.needs else (1, 2)):
            raise ValueError(
                "reduction attentive masks two data.views, or one where the objective compares no "
                f"second one; got {len(crops)}"
            )
        if is_attentive and (self.teacher or self.data.negative_image):
            raise ValueError(
                "reduction attentive trains on views: a teacher and data.negative_image, which are "
                "of the whole image, do not go with it"
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
        """Optimizer steps of the whole run; each stage is rounded down to whole batches."""
        if not self.stages:
            return self.samples // self.global_batch_size
        batches = [stage.changes.get("global_batch_size") for stage in self.stages]
        sizes = [batch or self.global_batch_size for batch in batches]
        return sum(s.samples // size for s, size in zip(self.stages, sizes, strict=True))
