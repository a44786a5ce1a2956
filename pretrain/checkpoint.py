"""Checkpoints: folders published by rename, verified by digest on load (docs/formats.md).

checkpoints/samples-000000012800/
    checkpoint.json   engine/     (resume: state-RANK.safetensors, by parameter name)
    config.yaml       model/      (evaluation-ready: an open_clip `local-dir:` folder with its
                                   tokenizer)
                      model_ema/  (the same with averaged weights, of a run with `ema`)
checkpoints/latest    one line, written last
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from configs.errors import CheckpointError
from configs.publish import publish_text, published_folder
from configs.registry import Config
from pretrain.model.similarity import NEEDS_PAIRMILL

VERSION = 2
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
ENGINE_FOLDER = "engine"
MODEL_FOLDER = "model"
EMA_FOLDER = "model_ema"
LATEST = "latest"


class CheckpointRecord(Config):
    """`checkpoint.json`: where the run stood, with what, and the digest of every file.

    `skipped_ranges`: half-open ranges of positions in the order of data that are never visited.
    """

    version: int
    samples_seen: int
    step: int
    skipped_samples: int
    skipped_ranges: tuple[tuple[int, int], ...] = ()
    config_digest: str
    manifest_digest: str
    world_size: int
    threads: int
    zero_stage: int
    device: str
    versions: dict[str, str]
    files: dict[str, str]


def file_digest(path: Path) -> str:
    """Return `xxh3-128:<hex>` of a file."""
    state = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return f"xxh3-128:{state.hexdigest()}"


def folder_name(samples_seen: int) -> str:
    """Return the name of the checkpoint at `samples_seen`; names sort by age."""
    return f"samples-{samples_seen:012d}"


def seal(folder: Path, record: dict[str, Any], digests: Mapping[str, str]) -> None:
    """Write checkpoint.json over all the files of a folder that is not published yet.

    `digests` (path -> digest) were taken while those files were written.
    """
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = {str(path.relative_to(folder)): path for path in paths}
    files = {name: digests.get(name) or file_digest(path) for name, path in names.items()}
    sealed = CheckpointRecord(version=VERSION, files=files, **record)
    publish_text(folder / "checkpoint.json", sealed.model_dump_json(indent=2) + "\n")


def read_record(folder: Path, *, verify: bool = True) -> CheckpointRecord:
    """Read checkpoint.json; with `verify`, also check the digest of every file it names."""
    path = folder / "checkpoint.json"
    try:
        record = CheckpointRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not a checkpoint: it has no checkpoint.json. Expected a folder such as "
            f"RUN/checkpoints/{folder_name(12800)}, or the run folder itself."
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if record.version != VERSION:
        raise CheckpointError(
            f"{path} is of version {record.version}, this pairmill reads {VERSION}."
        )
    for name, digest in record.files.items() if verify else ():
        member = folder / name
        if not member.is_file():
            raise CheckpointError(f"{folder} is damaged: {name} is missing.")
        if file_digest(member) != digest:
            raise CheckpointError(f"{folder} is damaged: {name} has changed since it was written.")
    return record


def publish_latest(checkpoints: Path, name: str) -> None:
    """Point `latest` at a published checkpoint; where it points there already, write nothing."""
    path = checkpoints / LATEST
    if not path.is_file() or path.read_bytes() != f"{name}\n".encode():
        publish_text(path, f"{name}\n")


def superseded(names: list[str], *, keep: int, keep_every: int | None) -> list[str]:
    """Return which of a run's checkpoints may go: all but the newest `keep`, and but the first
    one in each `keep_every` samples.
    """
    kept, passed = set(sorted(names)[-keep:]), 0
    for name in sorted(names) if keep_every else ():
        number = int(name.rpartition("-")[2]) // (keep_every or 1)
        if number > passed:
            kept.add(name)
            passed = number
    return [name for name in sorted(names) if name not in kept]


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; half of it can never be taken for a damaged one."""
    removed = folder.with_name(f".{folder.name}.tmp-removing")
    folder.rename(removed)
    shutil.rmtree(removed)


def usable_checkpoints(checkpoints: Path) -> list[Path]:
    """Return the published checkpoints of a run, newest first."""
    return sorted((p for p in checkpoints.glob("samples-*") if p.is_dir()), reverse=True)


def model_folder(path: Path) -> Path:
    """Return the open_clip folder that a path means: a run, a checkpoint, or such a folder itself.

    A run means its `latest` checkpoint. Raises CheckpointError with what was expected.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"there is no folder {path}. Expected a run folder, one of its checkpoints, or a "
            "folder "
            f"with {OPEN_CLIP_CONFIG}."
        )
    candidates = [path, path / "model"]
    for checkpoints in (path / "checkpoints", path):
        latest = checkpoints / "latest"
        if latest.is_file():
            name = latest.read_text(encoding="utf-8", errors="replace").strip()
            candidates.append(checkpoints / name / "model")
    for folder in candidates:
        if (folder / OPEN_CLIP_CONFIG).is_file() and (folder / OPEN_CLIP_WEIGHTS).is_file():
            return folder
    raise CheckpointError(
        f"{path} is not a checkpoint: neither a run with checkpoints/latest, nor a checkpoint with "
        f"model/, nor an open_clip folder with {OPEN_CLIP_CONFIG} and {OPEN_CLIP_WEIGHTS}."
    )


def verify_model(folder: Path) -> CheckpointRecord | None:
    """Check the files of a checkpoint's model folder against its digests; return the record.

    None for a model folder that is not part of a checkpoint. The engine's files are not read.
    """
    if not (folder.parent / "checkpoint.json").is_file():
        return None
    record = read_record(folder.parent, verify=False)
    for file in sorted(folder.iterdir()):
        written = record.files.get(f"{folder.name}/{file.name}")
        if written is not None and written != file_digest(file):
            raise CheckpointError(
                f"{folder.parent} is damaged: {folder.name}/{file.name} has changed since it was "
                "written. Take another checkpoint of the run."
            )
    return record


def export_model(path: Path, destination: Path) -> Path:
    """Copy the evaluation-ready model that `path` means to a new folder, published by rename.

    Raises CheckpointError where open_clip has no such model: another geometry, or towers without
    their last norms.
    """
    source = exportable(path, destination)
    with published_folder(destination) as temporary:
        for file in sorted(source.iterdir()):
            if file.is_file():
                shutil.copyfile(file, temporary / file.name)
    return destination


def exportable(path: Path, destination: Path) -> Path:
    """Return the folder of the model that `path` means, one that other libraries compute alike.

    Raises CheckpointError where they would not, or where `destination` exists.
    """
    source = model_folder(path)
    verify_model(source)
    description = json.loads((source / OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))
    if description.get("model_cfg", {}).get(NEEDS_PAIRMILL):
        geometry = description["pairmill"]["similarity"]["name"]
        norms = "" if description["model_cfg"].get("final_norm", True) else ", no final norms"
        raise CheckpointError(
            f"{path} cannot be exported: open_clip compares by cosine and has no such model "
            f"(geometry {geometry}{norms}); its scores would silently be others. Expected a model "
            "with similarity.name=cosine and final_norm. Use `pairmill evaluate`, or "
            "pretrain.model.clip.load_clip and pretrain.model.similarity.load_similarity."
        )
    if destination.exists():
        raise CheckpointError(f"{destination} exists already; choose another folder to export to.")
    return source
