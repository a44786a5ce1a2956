"""Save a run and find it again: all ranks write, rank 0 publishes; the newest sound checkpoint
wins.

A resumed run must be the same run: its configuration (but for intervals, workers, threads and the
folder) and its dataset are compared with the checkpoint's. A damaged checkpoint is passed over,
loudly.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import yaml

from configs.errors import CheckpointError
from configs.load import digest, to_yaml
from configs.publish import publish_folder, remove_leftovers
from pretrain import checkpoint
from pretrain.build import Parts
from pretrain.checkpoint import OPEN_CLIP_CONFIG
from pretrain.config import PretrainConfig
from pretrain.model.similarity import NEEDS_PAIRMILL
from pretrain.ranks import on_first_rank

# What may change between the parts of one run: it does not change the result.
_FREE_KEYS = {
    "name",
    "output",
    "intervals",
    "data.num_workers",
    "data.manifest",  # their digest, with the mixture's weights, is compared
    "data.mixture",
    "data.remote",
    "data.max_bad_fraction",
    "engine.num_threads",
    "model",  # what the file says is compared
}


class ResumePoint(NamedTuple):
    """Where a run stands: finished steps, and bad samples replaced so far on all ranks."""

    step_number: int
    num_bad: int


def save(config: PretrainConfig, parts: Parts, point: ResumePoint) -> Path:
    """Publish a checkpoint of the run at `point`; every rank must call it."""
    samples_seen = parts.stage.samples_at(point.step_number)
    checkpoints = Path(config.output) / "checkpoints"
    name = checkpoint.folder_name(samples_seen)
    temporary, final = checkpoints / f".{name}.tmp-saving", checkpoints / name
    is_first = parts.group.rank == 0
    if is_first:
        checkpoints.mkdir(parents=True, exist_ok=True)
        remove_leftovers(checkpoints)
        (temporary / "engine").mkdir(parents=True)
        (temporary / "model").mkdir()
    dist.barrier()
    parts.engine.save(temporary / "engine")
    random_state = temporary / "engine" / f"random_state_{parts.group.rank}.pt"
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    torch.save(states, random_state)
    weights = parts.engine.weights()
    dist.barrier()
    if is_first:
        parts.engine.model.save(temporary / "model", weights)
        parts.tokenizer.save(temporary / "model")
        (temporary / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        checkpoint.seal(temporary, _record(config, parts, point, samples_seen))
        if final.exists():  # a damaged one that the run was restarted before
            shutil.rmtree(final)
        publish_folder(temporary, final)
        checkpoint.publish_latest(checkpoints, name, keep=config.intervals.keep_checkpoints)
    dist.barrier()
    return final


def _record(
    config: PretrainConfig, parts: Parts, point: ResumePoint, samples_seen: int
) -> dict[str, Any]:
    return {
        "samples_seen": samples_seen,
        "step": point.step_number,
        "skipped_samples": point.num_bad,
        "config_digest": digest(config),
        "manifest_digest": parts.data.digest,
        "world_size": parts.group.size,
        "threads": torch.get_num_threads(),
        "zero_stage": parts.stage.config.engine.zero_stage,
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    packages = ("torch", "deepspeed", "open_clip_torch", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}


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
    parts.engine.load(folder / "engine")
    state = folder / "engine" / f"random_state_{parts.group.rank}.pt"
    if state.is_file():
        states = torch.load(state, weights_only=True)
        torch.set_rng_state(states["cpu"])
        if "cuda" in states and torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
    return ResumePoint(record.step, record.skipped_samples)


def newest_sound(config: PretrainConfig) -> Found | None:
    """Return the newest sound checkpoint of the run, passing over damaged ones, loudly."""
    return on_first_rank(lambda: _newest_sound(config, Path(config.output) / "checkpoints"))


def _newest_sound(config: PretrainConfig, checkpoints: Path) -> Found | None:
    damaged = []
    for folder in checkpoint.usable_checkpoints(checkpoints):
        try:
            record = checkpoint.read_record(folder)
        except CheckpointError as error:
            print(f"WARNING: {error} Going back to the checkpoint before it.", file=sys.stderr)
            damaged.append(folder)
            continue
        for other in damaged:  # out of the way: it must not count among those that are kept
            other.rename(other.with_name(f"damaged-{other.name}"))
        print(_continuing(config, folder, record), file=sys.stderr, flush=True)
        return Found(folder, record)
    if damaged:
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {checkpoints} is sound. "
            "Restore one, or remove the folder to start from the beginning."
        )
    return None


def _continuing(config: PretrainConfig, folder: Path, record: checkpoint.CheckpointRecord) -> str:
    message = f"continuing {config.name} from {folder} at {record.samples_seen:,} samples"
    now = {"threads": torch.get_num_threads(), "ranks": dist.get_world_size(), **_versions()}
    then = {"threads": record.threads, "ranks": record.world_size, **record.versions}
    changes = [f"{k} {then.get(k)} -> {now.get(k)}" for k in now if now.get(k) != then.get(k)]
    if changes:
        message += f"; the same samples, but equal to rounding only, since {', '.join(changes)}"
    return message


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
    if record.zero_stage > 0 and record.world_size != parts.group.size:
        raise CheckpointError(
            f"{folder} was written by {record.world_size} ranks at ZeRO stage {record.zero_stage} "
            "and "
            f"cannot be continued on {parts.group.size}; start {record.world_size} ranks."
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
