"""Find a run again: the newest sound checkpoint wins.

A resumed run must be the same run: its configuration (but for intervals, workers, threads, ZeRO
stage and the folder) and its dataset are compared with the checkpoint's. A damaged checkpoint is
passed over, loudly. The number of ranks and the ZeRO stage are free: the state is by name
(state_files.py).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from configs.errors import CheckpointError
from pretrain import checkpoint
from pretrain.build import Parts
from pretrain.checkpoint import OPEN_CLIP_CONFIG
from pretrain.config import PretrainConfig
from pretrain.model.similarity import NEEDS_PAIRMILL
from pretrain.ranks import on_first_rank
from pretrain.remote_checkpoints import Mirror
from pretrain.saving import RUN_STATE, ResumePoint, device_name, versions
from pretrain.training_state import load_state

# What may change between the parts of one run: it does not change the result.
_FREE_KEYS = {
    "name",
    "output",
    "intervals",
    "checkpoint",
    "evaluation",
    "telemetry",
    "data.num_workers",
    "data.manifest",  # their digest, with the mixture's weights, is compared
    "data.mixture",
    "data.remote",
    "data.max_bad_fraction",
    "engine.num_threads",
    "engine.zero_stage",
    "stability",
    "model",  # what the file says is compared
}


class Found(NamedTuple):
    """The newest sound checkpoint of a run."""

    folder: Path
    record: checkpoint.CheckpointRecord


def restore(config: PretrainConfig, parts: Parts, found: Found | None) -> ResumePoint:
    """Load a checkpoint of the run into the parts of its stage; return where it stood."""
    if found is None:
        return ResumePoint(0, 0)
    folder, record = found
    on_first_rank(lambda: _check_same_run(config, parts, folder, record))
    engine_folder = folder / checkpoint.ENGINE_FOLDER
    with_random = load_state(
        engine_folder, parts.engine.partitions, parts.ema, parts.group.rank, parts.mean_tower
    )
    run_state = json.loads((engine_folder / RUN_STATE).read_text(encoding="utf-8"))
    parts.engine.load_extra_state(run_state)
    if parts.group.rank == 0:
        print(_continuing(config, folder, record, parts), file=sys.stderr, flush=True)
    assert with_random or record.world_size != parts.group.size, "each rank wrote its own"
    return ResumePoint(record.step, record.skipped_samples, record.skipped_ranges)


def newest_sound(config: PretrainConfig) -> Found | None:
    """Return the newest sound checkpoint of the run, passing over damaged ones, loudly."""
    return on_first_rank(lambda: _newest_sound(config, Path(config.output) / "checkpoints"))


def _newest_sound(config: PretrainConfig, checkpoints: Path) -> Found | None:
    remote = config.checkpoint.remote
    if remote and not checkpoint.usable_checkpoints(checkpoints):
        Mirror(remote, config.intervals).restore(checkpoints)
    damaged = []
    for folder in checkpoint.usable_checkpoints(checkpoints):
        try:
            record = checkpoint.read_record(folder)
        except CheckpointError as error:
            print(f"WARNING: {error} Going back to the checkpoint before it.", file=sys.stderr)
            damaged.append(folder)
            continue
        for other in damaged:  # out of the way: it must not count among those that are kept
            _set_aside(other)
        checkpoint.publish_latest(checkpoints, folder.name)  # a kill may have come before it
        return Found(folder, record)
    if damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {checkpoints} is sound. "
            "Restore one, or remove the folder to start from the beginning."
        )
    return None


def _set_aside(folder: Path) -> None:
    aside = folder.with_name(f"damaged-{folder.name}")
    number = 1
    while aside.exists():  # damaged, written again, and damaged again
        number += 1
        aside = folder.with_name(f"damaged-{number}-{folder.name}")
    folder.rename(aside)


def _continuing(
    config: PretrainConfig, folder: Path, record: checkpoint.CheckpointRecord, parts: Parts
) -> str:
    message = f"continuing {config.name} from {folder} at {record.samples_seen:,} samples"
    reasons = inexact_reasons(record, parts)
    if not reasons:
        return f"{message}, bit for bit"
    return "\n  ".join([f"{message}: the same samples, but equal to rounding only:", *reasons])


def inexact_reasons(record: checkpoint.CheckpointRecord, parts: Parts) -> list[str]:
    """Say in one sentence each why going on from a checkpoint is not exact to the last bit."""
    reasons = []
    ranks, threads, stage = (
        parts.group.size,
        torch.get_num_threads(),
        parts.stage.config.engine.zero_stage,
    )
    if record.world_size != ranks:
        reasons.append(
            f"{_counted(record.world_size, 'rank')} wrote it and {_counted(ranks, 'rank')} go on: "
            "gradients are summed in other groups."
        )
    if record.threads != threads:
        reasons.append(
            f"{_counted(record.threads, 'thread')} a rank before, {threads} now: sums inside an "
            "operator are cut otherwise."
        )
    if record.zero_stage != stage:
        reasons.append(
            f"ZeRO stage {record.zero_stage} before, {stage} now: gradients are reduced in another "
            "order."
        )
    device = device_name(parts.engine.device)
    if record.device != device:
        reasons.append(f"the device was {record.device} and is {device}: its kernels are others.")
    elif parts.engine.device.type == "cuda":
        reasons.append("some kernels of a GPU add up in no fixed order.")
    for name, now in versions().items():
        if record.versions.get(name) != now:
            reasons.append(f"{name} was {record.versions.get(name)} and is {now}.")
    return reasons


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _check_same_run(
    config: PretrainConfig, parts: Parts, folder: Path, record: checkpoint.CheckpointRecord
) -> None:
    stored = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    model = json.loads((folder / "model" / OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))
    changes = _differences(stored, config.model_dump(mode="json"))
    model["model_cfg"].pop(NEEDS_PAIRMILL, None)
    changes += _differences(model["model_cfg"], parts.engine.model.config, "model ")
    if changes:
        raise CheckpointError(
            f"{folder} is of another run: {'; '.join(changes)}. "
            "Choose another `output`, or go back to the stored values."
        )
    if record.manifest_digest != parts.data.digest:
        raise CheckpointError(
            f"{folder} was trained on another dataset (manifest {record.manifest_digest[:12]}.., "
            "now "
            f"{parts.data.digest[:12]}..). Choose another `output`, or restore the dataset."
        )


def _differences(stored: Any, now: Any, path: str = "") -> list[str]:
    if path in _FREE_KEYS or stored == now:
        return []
    if isinstance(stored, dict) and isinstance(now, dict):
        keys = sorted({*stored, *now})
        parts = [
            _differences(
                stored.get(k), now.get(k), f"{path}.{k}".removeprefix(".").replace(" .", " ")
            )
            for k in keys
        ]
        return [change for part in parts for change in part]
    return [f"{path} was {stored!r}, now {now!r}"]
