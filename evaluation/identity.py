"""What a checkpoint is, without loading its model: where its weights are, digests, geometry.

A run of which all is done needs no more: nothing here imports torch or open_clip before a name of
open_clip's or a device has to be looked up.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from configs.errors import CheckpointError, ConfigError, UsageError, did_you_mean
from evaluation.tar import file_sha256
from pretrain.checkpoint import model_folder, verify_model
from pretrain.model.similarity import CONFIG_FILE, Similarity, similarities, similarity_of

if TYPE_CHECKING:
    import torch

# The names and the order in which open_clip looks for weights in a `local-dir:`.
WEIGHTS_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
HUB, LOCAL = "hf-hub:", "local-dir:"
EMA_FOLDER = "model_ema"  # beside `model` in a checkpoint
Weights = Literal["raw", "ema"]


@dataclass(frozen=True)
class ModelSource:
    """Where a checkpoint's model is: a local folder, or an open_clip name with its tag."""

    checkpoint: str  # as the user named it
    name: str  # as open_clip names it
    tag: str | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Identity:
    """What can be said of a checkpoint without loading its model."""

    checkpoint: str
    digest: str  # sha256 of the weights file
    samples_seen: int | None
    similarity: Similarity
    setting_digest: str  # sha256 of architecture, preprocessing and tokenizer


def find_model(checkpoint: str, weights: Weights = "raw") -> ModelSource:
    """Say where a checkpoint's model is, without loading it; `weights` ema: its averaged one.

    Raises CheckpointError where it is neither a folder with a model nor an open_clip model with
    weights.
    """
    path = Path(checkpoint.removeprefix(LOCAL))
    if path.exists() or checkpoint.startswith(LOCAL):
        folder = path if (path / CONFIG_FILE).is_file() else model_folder(path)
        if weights == "ema":
            folder = _ema_folder(checkpoint, folder)
        weights_file(folder)
        return ModelSource(checkpoint, f"{LOCAL}{folder.resolve()}", folder=folder)
    if weights == "ema":
        raise CheckpointError(
            f"weights: got ema, but {checkpoint!r} is an open_clip model, which has one set of "
            "weights. Expected a run or a checkpoint of ours, or weights=raw."
        )
    if checkpoint.startswith(HUB):
        return ModelSource(checkpoint, checkpoint)
    from pretrain.model.clip import open_clip

    known = open_clip.list_models()
    name, _, tag = checkpoint.rpartition("/")
    if checkpoint.replace("/", "-") in known:
        name, tag = checkpoint.replace("/", "-"), ""
    if name not in known:
        raise CheckpointError(
            f"there is no checkpoint {checkpoint!r}: neither a path here nor an open_clip model"
            f"{did_you_mean(name or checkpoint, known)} Expected a run folder, a checkpoint "
            "folder, a folder with "
            f"{CONFIG_FILE}, or an open_clip model with its tag, such as ViT-B-32/openai."
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        got = f"the tag {tag!r}" if tag else "no tag: its weights would be random"
        raise CheckpointError(
            f"open_clip model {name}: got {got}. Expected {name}/TAG with one of: "
            f"{', '.join(tags) or '(none)'}."
        )
    return ModelSource(checkpoint, name, tag=tag)


def _ema_folder(checkpoint: str, folder: Path) -> Path:
    averaged = folder.with_name(EMA_FOLDER)
    if not (averaged / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"weights: got ema, but {checkpoint!r} has no averaged weights ({averaged}). Expected "
            "a checkpoint of a run with `ema` on, or weights=raw."
        )
    return averaged


def weights_file(folder: Path) -> Path:
    """Return the weights of an open_clip folder. Raises CheckpointError where it has none."""
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder} has {CONFIG_FILE} but no weights; expected {WEIGHTS_FILES[0]} beside it."
    )


def choose_device(name: str) -> torch.device:
    """Return the torch device of a configured name; `auto` is cuda where there is one, else cpu."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device: got {name!r}; expected auto, cpu, cuda or cuda:N.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device: got {name!r}, but torch sees no CUDA device; use cpu or auto.")
    return device


def identify(checkpoint: str, weights: Weights = "raw") -> Identity:
    """Read a checkpoint's digests and geometry; its model is not built.

    Raises CheckpointError where that cannot be.
    """
    source = find_model(checkpoint, weights)
    try:
        path = weights_file(source.folder) if source.folder else downloaded_weights(source)
    except CheckpointError:
        raise
    except Exception as error:  # the hub client raises its own
        raise unloadable(source, error) from error
    return Identity(
        checkpoint=checkpoint,
        digest=file_sha256(path),
        samples_seen=samples_seen_of(source.folder),
        similarity=stored_similarity(source),
        setting_digest=_setting_digest(source),
    )


def _setting_digest(source: ModelSource) -> str:
    """The sha256 over everything but the weights that features depend on."""
    setting: list[Any] = [version("open_clip_torch")]
    if source.folder is None:
        setting += [source.name, source.tag]
    else:
        known = {path.name for path in source.folder.iterdir()} - set(WEIGHTS_FILES)
        files = [source.folder / name for name in sorted(known)]
        setting += [[p.name, file_sha256(p)] for p in files if p.is_file()]
    return hashlib.sha256(json.dumps(setting).encode()).hexdigest()


def unloadable(source: ModelSource, error: Exception) -> CheckpointError:
    """Return what to say of a checkpoint that open_clip cannot load."""
    advice = (
        f"Expected a folder with {CONFIG_FILE}, weights that fit it, and its tokenizer's files."
        if source.folder is not None
        else "It has to be downloaded: check the network, or give a local open_clip folder."
    )
    reason = str(error).rstrip(". ")
    return CheckpointError(f"open_clip could not load {source.checkpoint!r}: {reason}. {advice}")


def downloaded_weights(source: ModelSource) -> Path:
    """Return the weights file in the download cache, where create_model has just put it."""
    from pretrain.model.clip import open_clip

    # After pretrain.model.clip, which mends the import of torchvision beside CPU torch.
    from open_clip.pretrained import download_pretrained_from_hf  # isort: skip

    if source.tag is None:
        return Path(download_pretrained_from_hf(source.name.removeprefix(HUB)))
    return Path(
        open_clip.download_pretrained(open_clip.get_pretrained_cfg(source.name, source.tag))
    )


def description_of(folder: Path | None) -> dict[str, Any]:
    """Return what an open_clip folder says of its model; empty for a model by name."""
    if folder is None:
        return {}
    return dict(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))


def stored_similarity(source: ModelSource) -> Similarity:
    """Return the geometry of a checkpoint. Raises CheckpointError where there is no such one."""
    description = description_of(source.folder)
    try:
        return similarity_of(description)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        problem = str(error) if isinstance(error, ConfigError) else f"{error!r}."
        raise CheckpointError(
            f"{source.folder}/{CONFIG_FILE}: pairmill.similarity cannot be used: {problem} "
            f"Expected a section whose name is one of: {', '.join(similarities)}; or no "
            "`pairmill` section, for cosine."
        ) from None


def samples_seen_of(folder: Path | None) -> int | None:
    """Return how far training was, where the model is part of a checkpoint; verify its files."""
    record = None if folder is None else verify_model(folder)
    return None if record is None else record.samples_seen
