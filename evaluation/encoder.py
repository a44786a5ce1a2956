"""A checkpoint as two functions: pictures to features, texts to features.

A checkpoint is one of ours (a run folder or one of its checkpoints), any open_clip folder, or an
open_clip model with its pretrained tag (`ViT-B-32/openai`, `hf-hub:org/repo`). Preprocessing,
tokenizer and similarity come with it. Weights are read from safetensors or by torch's weights-only
loader.

Legend: b a batch, D embedding width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from configs.errors import CheckpointError, ConfigError, UsageError, did_you_mean
from evaluation.tar import file_sha256
from pretrain.checkpoint import model_folder, verify_model
from pretrain.model.clip import load_clip
from pretrain.model.similarity import (
    CONFIG_FILE,
    NEEDS_PAIRMILL,
    Similarity,
    similarities,
    similarity_of,
)
from pretrain.model.tokenizer import TOKENIZER_FILE, Tokenizer

# open_clip must come after pretrain.model.clip, which mends the import of torchvision beside CPU
# torch.
import open_clip  # isort: skip
from open_clip.pretrained import download_pretrained_from_hf  # isort: skip
from open_clip.transform import PreprocessCfg, image_transform_v2  # isort: skip

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


@dataclass(frozen=True)
class Encoder:
    """A model in evaluation mode with its own preprocessing, tokenizer and similarity."""

    checkpoint: str
    digest: str  # sha256 of the weights file
    samples_seen: int | None
    transform: Callable[[Image.Image], Tensor]
    similarity: Similarity
    model: Any
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    precision: str

    def encode_images(self, pixels_b3HW: Tensor) -> Tensor:
        """Return features [b, D] (float32, on the CPU, not normalized) of preprocessed pixels."""
        with torch.no_grad(), self._autocast():
            features_bD = self.model.encode_image(pixels_b3HW.to(self.device))
        return self._checked(features_bD, "an image")

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Return text features [b, D] (float32, on the CPU, not normalized)."""
        return self.encode_tokens(self.tokens(texts))

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Return the token ids [b, L] of texts."""
        return self.tokenizer(list(texts))

    def encode_tokens(self, token_bL: Tensor) -> Tensor:
        """Return text features [b, D] (float32, on the CPU, not normalized) of token ids."""
        with torch.no_grad(), self._autocast():
            features_bD = self.model.encode_text(token_bL.to(self.device))
        return self._checked(features_bD, "a text")

    @property
    def logit_scale(self) -> float:
        """exp(s), what the model's similarities are multiplied by."""
        return float(self.model.logit_scale.detach().float().exp())

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _checked(self, features_bD: Tensor, what: str) -> Tensor:
        features_bD = features_bD.float().cpu()
        # A comparison with NaN is false, so a ranking of NaN would look perfect.
        if not bool(torch.isfinite(features_bD).all()):
            raise CheckpointError(
                f"{self.checkpoint}: the model gives features that are not finite for {what} "
                f"(precision {self.precision}). The weights are damaged or training diverged; take "
                "an "
                "earlier checkpoint, or precision=fp32."
            )
        return features_bD


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
        _weights_file(folder)
        return ModelSource(checkpoint, f"{LOCAL}{folder.resolve()}", folder=folder)
    if weights == "ema":
        raise CheckpointError(
            f"weights: got ema, but {checkpoint!r} is an open_clip model, which has one set of "
            "weights. Expected a run or a checkpoint of ours, or weights=raw."
        )
    if checkpoint.startswith(HUB):
        return ModelSource(checkpoint, checkpoint)
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


def _weights_file(folder: Path) -> Path:
    for name in WEIGHTS_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder} has {CONFIG_FILE} but no weights; expected {WEIGHTS_FILES[0]} beside it."
    )


def choose_device(name: str) -> torch.device:
    """Return the torch device of a configured name; `auto` is cuda where there is one, else cpu."""
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
        path = _weights_file(source.folder) if source.folder else _downloaded_weights(source)
    except CheckpointError:
        raise
    except Exception as error:  # the hub client raises its own
        raise _unloadable(source, error) from error
    return Identity(
        checkpoint=checkpoint,
        digest=file_sha256(path),
        samples_seen=_samples_seen(source.folder),
        similarity=_similarity(source),
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


def _unloadable(source: ModelSource, error: Exception) -> CheckpointError:
    advice = (
        f"Expected a folder with {CONFIG_FILE}, weights that fit it, and its tokenizer's files."
        if source.folder is not None
        else "It has to be downloaded: check the network, or give a local open_clip folder."
    )
    reason = str(error).rstrip(". ")
    return CheckpointError(f"open_clip could not load {source.checkpoint!r}: {reason}. {advice}")


def load_encoder(
    checkpoint: str, *, device: str = "auto", precision: str = "fp32", weights: Weights = "raw"
) -> Encoder:
    """Load a checkpoint for evaluation. Raises CheckpointError where that cannot be."""
    source = find_model(checkpoint, weights)
    target = choose_device(device)
    samples_seen = _samples_seen(source.folder)
    try:
        model = _load_model(source).to(target)
        path = _weights_file(source.folder) if source.folder else _downloaded_weights(source)
        tokenizer = _tokenizer(source)
        preprocessing = _preprocessing(source, model)
        transform = image_transform_v2(preprocessing, is_train=False)
        similarity = _similarity(source)
    except CheckpointError:
        raise
    except Exception as error:  # open_clip, its hub client and safetensors each raise their own
        raise _unloadable(source, error) from error
    model.eval()
    return Encoder(
        checkpoint=checkpoint,
        digest=file_sha256(path),
        samples_seen=samples_seen,
        transform=transform,
        similarity=similarity,
        model=model,
        tokenizer=tokenizer,
        device=target,
        precision=precision,
    )


def _is_ours_alone(source: ModelSource) -> bool:
    """Whether the folder holds a model of ours that open_clip refuses: another geometry."""
    return bool(_description(source.folder).get("model_cfg", {}).get(NEEDS_PAIRMILL))


def _load_model(source: ModelSource) -> Any:
    if source.folder is not None and _is_ours_alone(source):
        return load_clip(source.folder)
    return open_clip.create_model(source.name, pretrained=source.tag, require_pretrained=True)


def _preprocessing(source: ModelSource, model: Any) -> PreprocessCfg:
    if _is_ours_alone(source):
        side = model.visual.image_size
        return PreprocessCfg(**{**_description(source.folder)["preprocess_cfg"], "size": side})
    return PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))


def _downloaded_weights(source: ModelSource) -> Path:
    """Return the weights file in the download cache, where create_model has just put it."""
    if source.tag is None:
        return Path(download_pretrained_from_hf(source.name.removeprefix(HUB)))
    return Path(
        open_clip.download_pretrained(open_clip.get_pretrained_cfg(source.name, source.tag))
    )


def _description(folder: Path | None) -> dict[str, Any]:
    if folder is None:
        return {}
    return dict(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))


def _similarity(source: ModelSource) -> Similarity:
    description = _description(source.folder)
    try:
        return similarity_of(description)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        problem = str(error) if isinstance(error, ConfigError) else f"{error!r}."
        raise CheckpointError(
            f"{source.folder}/{CONFIG_FILE}: pairmill.similarity cannot be used: {problem} "
            f"Expected a section whose name is one of: {', '.join(similarities)}; or no "
            "`pairmill` section, for cosine."
        ) from None


def _tokenizer(source: ModelSource) -> Callable[[list[str]], Tensor]:
    # A foreign folder's tokenizer.json may want cleaning or padding that only open_clip knows of.
    ours = "pairmill" in _description(source.folder)
    if ours and source.folder is not None and (source.folder / TOKENIZER_FILE).is_file():
        return Tokenizer.load(source.folder)
    tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(source.name)
    return tokenizer


def _samples_seen(folder: Path | None) -> int | None:
    """Return how far training was, where the model is part of a checkpoint; verify its files."""
    record = None if folder is None else verify_model(folder)
    return None if record is None else record.samples_seen
