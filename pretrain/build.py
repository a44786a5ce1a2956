"""Build the parts of a run from its configuration: data, tokenizer, model, engine, batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from braceexpand import braceexpand

from configs.errors import ConfigError, PairmillError
from pretrain.config import AugmentationConfig, PretrainConfig
from pretrain.data.augment import ImageTransform
from pretrain.data.batch import Batch, BatchPlan, SampleForm
from pretrain.data.captions import CaptionChoice
from pretrain.data.dataset import Sources, open_sources
from pretrain.data.loader import BatchDataset, batches
from pretrain.data.remote import CachePlan
from pretrain.data.streaming import Stream, StreamDataset, stream_batches
from pretrain.ema import Ema
from pretrain.engine import Engine
from pretrain.initial import start_towers
from pretrain.model.attentive import MeanTower
from pretrain.model.clip import DEFAULT_IMAGE_WIDTH, ClipModel, Json, read_model_config
from pretrain.model.heads import Heads
from pretrain.model.positions import carried, carry_weights
from pretrain.model.tokenizer import Tokenizer
from pretrain.objectives.group import Group, world_or_solo
from pretrain.objectives.registry import Total
from pretrain.ranks import on_first_rank
from pretrain.reduction.image import AttentivePatches
from pretrain.reduction.text import (
    FrequencyKeys,
    TextReduction,
    TokenKeys,
    Vocabulary,
    removal_probabilities,
)
from pretrain.run_tokenizer import run_tokenizer, with_tokenizer
from pretrain.stages import Stage, Stages
from pretrain.teacher import Teacher

Batches = Iterator[Batch | PairmillError]


@dataclass(frozen=True)
class Parts:
    """What a stage of a run is made of on one rank."""

    stage: Stage
    data: Sources | Stream
    tokenizer: Tokenizer
    engine: Engine
    objective: Total
    group: Group
    dataset: BatchDataset | StreamDataset
    teacher: Teacher | None
    ema: Ema | None
    mean_tower: MeanTower | None

    def batches(
        self, *, first: int, last: int, num_workers: int, skipped: Sequence[tuple[int, int]] = ()
    ) -> Batches:
        """Yield this rank's parts of the global batches over samples consumed [first, last).

        `skipped` are ranges of positions that are left out (data/order.py).
        """
        self.dataset.plan = replace(self.dataset.plan, skipped=tuple(skipped))
        return open_batches(self.dataset, first=first, last=last, num_workers=num_workers)


def build_parts(
    config: PretrainConfig, stage: Stage, device: torch.device, *, starts: bool = True
) -> Parts:
    """Build everything that a stage needs, with fresh weights; ranks end up with equal ones.

    `config` is the whole run's; the processes have started (engine.start_processes). Where a run
    `starts`, towers with `initial` weights get them; elsewhere a checkpoint will fill them.
    """
    stages = Stages.of(config).stages
    first = stages[0].config
    data = read_data(first)
    length = stage_model_config(first)["text_cfg"]["context_length"]
    counted = any(s.config.text_reduction.name == "frequency" for s in stages)
    tokenizer = run_tokenizer(first, data, length, counted=counted)
    if stage.config.data != first.data:
        data = read_data(stage.config)
    return _build_stage(stage, data, tokenizer, device, before=None, starts=starts)


def next_parts(before: Parts, stage: Stage) -> Parts:
    """Return the parts of the stage after `before`, with its weights; `before` is used up."""
    config, data = stage.config, before.data
    if config.data != before.stage.config.data:
        data = read_data(config)
    return _build_stage(stage, data, before.tokenizer, before.engine.device, before)


def _build_stage(
    stage: Stage,
    data: Sources | Stream,
    tokenizer: Tokenizer,
    device: torch.device,
    before: Parts | None,
    *,
    starts: bool = False,
) -> Parts:
    config = stage.config
    check_batch(config, dist.get_world_size())
    model_config = stage_model_config(config)
    tokenizer = tokenizer.with_context(model_config["text_cfg"]["context_length"])
    group = world_or_solo()
    keeps = before is not None and stage.keep_optimizer
    if before is not None and keeps:
        engine, teacher, model = before.engine, before.teacher, before.engine.model
        ema, mean_tower = before.ema, before.mean_tower
    else:
        torch.manual_seed(config.seed)
        teacher = None if config.teacher is None else Teacher(config.teacher.checkpoint).to(device)
        model = build_model(config, with_tokenizer(model_config, tokenizer), teacher)
        if teacher is not None:
            teacher.check_fits(model, tokenizer)
        averages = means = None
        weights = {} if before is None else before.engine.weights()
        weights = {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
        if before is not None and before.ema is not None:  # what was locked has no average
            whole = {**weights, **before.ema.whole()}
            averages = carried(whole, before.engine.model.config, model)
        if before is not None and before.mean_tower is not None:
            means = before.mean_tower.named_averages()
            means = carried(means, before.engine.model.config, model)
        if starts:
            start_towers(model, config, tokenizer)
        if before is not None:
            carry_weights(weights, before.engine.model.config, model)
            before.engine.close()
        mean_tower, reduction = None, config.reduction.build()
        if isinstance(reduction, AttentivePatches):
            mean_tower = MeanTower(model, reduction, config.engine.precision).to(device)
            mean_tower.load(means or {})
        engine, ema = Engine(model, config, device), None
        if before is not None:  # the counts are the run's; the norms of another stage are others
            engine.stability = before.engine.stability
        if config.ema is not None:
            ema = Ema(engine.partitions, config.ema.half_life_samples, averages)
    one_source = data.num_samples if isinstance(data, Sources) and len(data.sources) == 1 else None
    ranks = {"rank": group.rank, "world_size": group.size}
    dataset = build_dataset(
        config, data, tokenizer, model, **ranks, skipped=stage.skipped(one_source)
    )
    total = config.total
    return Parts(stage, data, tokenizer, engine, total, group, dataset, teacher, ema, mean_tower)


def stage_model_config(config: PretrainConfig) -> Json:
    """Read the model JSON with the image size, positions and context length of the run or stage.

    Raises ConfigError where the image does not divide into patches.
    """
    model = read_model_config(config.model)
    vision, text = dict(model["vision_cfg"]), dict(model["text_cfg"])
    if config.image_size is not None:
        vision["image_size"] = config.image_size
    if config.image_positions is not None:
        vision["pos_embed_type"] = config.image_positions
    if config.context_length is not None:
        text["context_length"] = config.context_length
    if vision["image_size"] % vision["patch_size"]:
        raise ConfigError(
            f"image_size {vision['image_size']} does not divide into patches of "
            f"{vision['patch_size']} px; choose a multiple of it."
        )
    return {**model, "vision_cfg": vision, "text_cfg": text}


def build_model(config: PretrainConfig, model_config: Json, teacher: Teacher | None) -> ClipModel:
    """Build the model with its geometry, its logits' start, and the heads its objectives need."""
    similarity = config.similarity.build()
    total, width = config.total, int(model_config["embed_dim"])
    for term in config.objective:
        if max(term.matryoshka, default=0) > width:
            raise ConfigError(
                f"objective {term.name}: matryoshka got {list(term.matryoshka)}, expected "
                f"dimensions up to the model's embed_dim, {width}."
            )
    heads = Heads(
        image_width=int(model_config["vision_cfg"].get("width", DEFAULT_IMAGE_WIDTH)),
        view_width=config.view_head_width if "views" in total.needs else None,
        mean_width=config.view_head_width if "mean_target" in total.needs else None,
        embed_dim=width,
        teacher_dim=None if teacher is None else teacher.embed_dim,
    )
    logits = config.logits(similarity.initial_logit_scale)
    return ClipModel(model_config, similarity, logits=logits, heads=heads)


def read_data(config: PretrainConfig) -> Sources | Stream:
    """Open what the run trains on; rank 0 indexes what has no index and looks at every shard."""
    if config.data.source == "streaming":
        urls = [url for pattern in config.data.urls for url in _expanded(pattern)]
        return Stream(tuple(urls))
    on_first_rank(lambda: open_sources(config.data))
    return open_sources(config.data, first_rank=False)


def _expanded(pattern: str) -> Iterator[str]:
    # a shell command may have braces of its own
    yield from [pattern] if pattern.startswith("pipe:") else braceexpand(pattern)


def check_batch(config: PretrainConfig, world_size: int) -> None:
    """Refuse a global batch that does not divide among the ranks."""
    if config.global_batch_size % world_size:
        raise ConfigError(
            f"global_batch_size {config.global_batch_size:,} does not divide among {world_size} "
            "ranks; "
            f"choose a multiple of {world_size}."
        )


def build_dataset(
    config: PretrainConfig,
    data: Sources | Stream,
    tokenizer: Tokenizer,
    model: ClipModel,
    *,
    rank: int,
    world_size: int,
    skipped: tuple[tuple[int, int], ...] = (),
) -> BatchDataset | StreamDataset:
    """Return the dataset of one rank's batches; `skipped` are positions left out (order.py)."""

    def transform(section: AugmentationConfig) -> ImageTransform:
        return ImageTransform(
            image_size=model.image_size,
            max_image_pixels=config.data.max_image_pixels,
            **section.model_dump(),
        )

    captions = config.data.captions
    form = SampleForm(
        image=transform(config.augmentation),
        caption=CaptionChoice(places=tuple(captions.places.items()), templates=captions.templates),
        views=tuple(map(transform, config.data.views)),
        negative_caption=captions.negative,
        negative_image=config.data.negative_image,
    )
    plan = BatchPlan(
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        rank=rank,
        world_size=world_size,
        window_shards=config.data.window_shards,
        patch_rows=model.patch_rows,
        image_reduction=config.reduction.build(),
        text_reduction=build_text_reduction(config, tokenizer),
        skipped=skipped,
    )
    if isinstance(data, Stream):
        return StreamDataset(data, form, tokenizer, plan)
    remote = config.data.remote
    cache = CachePlan(
        folder=remote.path / "shards",
        max_bytes=remote.cache_bytes,
        retries=remote.retries,
        num_threads=remote.num_threads,
    )
    return BatchDataset(data, form, tokenizer, plan, cache)


def build_text_reduction(config: PretrainConfig, tokenizer: Tokenizer) -> TextReduction:
    """Return the text reduction of a stage with what its keys are made of. Raises ConfigError."""
    section = config.text_reduction
    keys: TokenKeys = section.build()
    if section.num_tokens is not None and section.num_tokens >= tokenizer.context_length:
        raise ConfigError(
            f"text_reduction.num_tokens: got {section.num_tokens}, expected less than the context "
            f"length of {tokenizer.context_length}; to keep all of it, leave num_tokens out."
        )
    rank = tokenizer.speech_ranks() if "rank" in keys.needs else None
    removal = None
    if isinstance(keys, FrequencyKeys):
        assert tokenizer.token_counts is not None, "counted where a stage asks for it"
        removal = removal_probabilities(tokenizer.token_counts, keys.threshold)
    return TextReduction(keys, section.num_tokens, Vocabulary(rank, removal))


def open_batches(
    dataset: BatchDataset | StreamDataset, *, first: int, last: int, num_workers: int
) -> Batches:
    """Yield one rank's parts of the global batches over samples consumed [first, last)."""
    if isinstance(dataset, StreamDataset):
        return stream_batches(dataset, first=first, last=last, num_workers=num_workers)
    return batches(dataset, first=first, last=last, num_workers=num_workers)
