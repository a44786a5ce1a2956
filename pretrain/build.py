"""Build the parts of a run from its configuration: manifest, tokenizer, model, engine, data."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import torch
import torch.distributed as dist

from configs import draws
from configs.errors import ConfigError, DataError
from configs.publish import published_folder
from curation.manifest import Manifest, read_index, read_manifest
from pretrain.config import PretrainConfig
from pretrain.data.decode import ImageTransform
from pretrain.data.loader import BatchDataset, BatchPlan
from pretrain.engine import Engine, start_processes
from pretrain.model.clip import ClipModel, Json, read_model_config
from pretrain.model.tokenizer import END_ID, TOKENIZER_FILE, Tokenizer
from pretrain.objectives.group import Group, world_or_solo
from pretrain.objectives.registry import Objective
from pretrain.ranks import on_first_rank


@dataclass(frozen=True)
class Parts:
    """What a run is made of on one rank."""

    manifest: Manifest
    tokenizer: Tokenizer
    engine: Engine
    objective: Objective
    group: Group
    dataset: BatchDataset


def build_parts(config: PretrainConfig) -> Parts:
    """Start the processes and build everything; ranks end up with equal weights."""
    manifest = read_dataset(config)
    model_config = read_model_config(config.model)
    device = start_processes(config.engine.num_threads)
    check_batch(config, dist.get_world_size())
    tokenizer = run_tokenizer(config, manifest, model_config["text_cfg"]["context_length"])
    torch.manual_seed(config.seed)
    model = ClipModel(with_tokenizer(model_config, tokenizer))
    group = world_or_solo()
    dataset = build_dataset(config, manifest, tokenizer, model, group)
    engine = Engine(model, config, device)
    return Parts(manifest, tokenizer, engine, config.objective.build(), group, dataset)


def read_dataset(config: PretrainConfig) -> Manifest:
    """Read the manifest; raise DataError where there is nothing in it to train on.

    Rank 0 looks at every shard on disk, the others need not.
    """
    manifest = read_manifest(
        Path(config.data.manifest), check_files=os.environ.get("RANK", "0") == "0"
    )
    if manifest.num_samples == 0:
        raise DataError(
            f"{config.data.manifest}: the manifest has no samples. Curate again with looser rules."
        )
    return manifest


def check_batch(config: PretrainConfig, world_size: int) -> None:
    """Refuse a global batch that does not divide among the ranks."""
    if config.global_batch_size % world_size:
        raise ConfigError(
            f"global_batch_size {config.global_batch_size:,} does not divide among {world_size} "
            "ranks; "
            f"choose a multiple of {world_size}."
        )


def build_dataset(
    config: PretrainConfig, manifest: Manifest, tokenizer: Tokenizer, model: ClipModel, group: Group
) -> BatchDataset:
    """Return the dataset of this rank's batches."""
    transform = ImageTransform(
        image_size=model.image_size,
        scale=config.augmentation.scale,
        ratio=config.augmentation.ratio,
        flip=config.augmentation.flip,
        max_image_pixels=config.data.max_image_pixels,
    )
    plan = BatchPlan(
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        rank=group.rank,
        world_size=group.size,
        window_shards=config.data.window_shards,
        num_patches=model.num_patches,
        mask_ratio=config.reduction.mask_ratio,
    )
    return BatchDataset(manifest, transform, tokenizer, plan)


def run_tokenizer(config: PretrainConfig, manifest: Manifest, context_length: int) -> Tokenizer:
    """Return the run's tokenizer: made once, by rank 0, and kept in the run folder.

    It is made again where the dataset, its section or the context length is another.
    """
    folder = Path(config.output) / "tokenizer"
    made_from = {
        "manifest_digest": manifest.digest,
        "tokenizer": config.tokenizer.model_dump(mode="json"),
        "context_length": context_length,
    }

    def make() -> None:
        note = folder / "made_from.json"
        if note.is_file() and json.loads(note.read_text(encoding="utf-8")) == made_from:
            return
        tokenizer = Tokenizer.train_words(
            sample_captions(manifest, config.tokenizer.num_captions),
            vocab_size=config.tokenizer.vocab_size,
            context_length=context_length,
        )
        shutil.rmtree(folder, ignore_errors=True)
        with published_folder(folder) as temporary:
            tokenizer.save(temporary)
            (temporary / note.name).write_text(json.dumps(made_from, indent=2), encoding="utf-8")

    on_first_rank(make)
    return Tokenizer.load(folder)


def sample_captions(manifest: Manifest, num_captions: int) -> Iterator[str]:
    """Yield the captions of whole shards, in an order drawn by hash, until there are enough."""
    num_yielded = 0
    for shard in draws.permutation(manifest.num_shards, 0, "tokenizer/shards"):
        if num_yielded >= num_captions:
            return
        table = read_index(manifest.path(int(shard)), columns=["caption", "problem"])
        usable = table.filter(pc.is_null(table["problem"]))["caption"].drop_null().to_pylist()
        num_yielded += len(usable)
        yield from usable


def with_tokenizer(model_config: Json, tokenizer: Tokenizer) -> Json:
    """Return the model config with the text tower fitted to the tokenizer.

    The vocabulary is as large as the tokenizer's, the text feature is taken at its end token, and
    `hf_tokenizer_name` tells open_clip to read the tokenizer.json beside the weights.
    """
    fitted = {
        "vocab_size": tokenizer.vocab_size,
        "context_length": tokenizer.context_length,
        "pool_type": "eos",
        "eos_id": END_ID,
        "hf_tokenizer_name": TOKENIZER_FILE,
    }
    return {**model_config, "text_cfg": {**model_config["text_cfg"], **fitted}}
