"""A checkpoint as two functions: pictures to features, texts to features.

A checkpoint is one of ours (a run folder or one of its checkpoints), any open_clip folder, or an
open_clip model with its pretrained tag (`ViT-B-32/openai`, `hf-hub:org/repo`). Preprocessing,
tokenizer and similarity come with it. Weights are read from safetensors or by torch's weights-only
loader.

Legend: b a batch, D embedding width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from configs.errors import CheckpointError
from evaluation.identity import (
    ModelSource,
    Weights,
    choose_device,
    description_of,
    downloaded_weights,
    find_model,
    samples_seen_of,
    stored_similarity,
    unloadable,
    weights_file,
)
from evaluation.tar import file_sha256
from pretrain.model.clip import load_clip
from pretrain.model.patches import encode_text
from pretrain.model.similarity import NEEDS_PAIRMILL, Similarity
from pretrain.model.tokenizer import TOKENIZER_FILE, Tokenizer

# open_clip must come after pretrain.model.clip, which mends the import of torchvision beside CPU
# torch.
import open_clip  # isort: skip
from open_clip.transform import PreprocessCfg, image_transform_v2  # isort: skip


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

    def text_lengths(self, token_bL: Tensor) -> Tensor:
        """Return how many positions of each text [b] its feature depends on.

        In a causal tower that pools at the end token, what stands after it changes nothing.
        """
        is_causal = type(self.model) is open_clip.CLIP and self.model.attn_mask is not None
        pool = self.model.text_pool_type if is_causal else None
        if pool == "argmax":
            end_b = token_bL.argmax(dim=1)
        elif pool == "eos":
            # Where a text has no end token, open_clip pools at the first position.
            end_b = (token_bL == self.model.text_eos_id).int().argmax(dim=1)
        else:
            end_b = torch.full((len(token_bL),), token_bL.shape[1] - 1)
        return end_b + 1

    def encode_tokens(self, token_bL: Tensor) -> Tensor:
        """Return text features [b, D] (float32, on the CPU, not normalized) of token ids.

        Positions that no text of the batch needs are left out (see text_lengths).
        """
        needed = int(self.text_lengths(token_bL).max())
        kept_bK = torch.arange(needed, device=self.device).expand(len(token_bL), -1)
        is_whole = needed == token_bL.shape[1]
        with torch.no_grad(), self._autocast():
            token_bL = token_bL.to(self.device)
            features_bD = (
                self.model.encode_text(token_bL)
                if is_whole
                else encode_text(self.model, token_bL, kept_bK)
            )
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


def load_encoder(
    checkpoint: str, *, device: str = "auto", precision: str = "fp32", weights: Weights = "raw"
) -> Encoder:
    """Load a checkpoint for evaluation. Raises CheckpointError where that cannot be."""
    source = find_model(checkpoint, weights)
    target = choose_device(device)
    samples_seen = samples_seen_of(source.folder)
    try:
        model = _load_model(source).to(target)
        path = weights_file(source.folder) if source.folder else downloaded_weights(source)
        tokenizer = _tokenizer(source)
        preprocessing = _preprocessing(source, model)
        transform = image_transform_v2(preprocessing, is_train=False)
        similarity = stored_similarity(source)
    except CheckpointError:
        raise
    except Exception as error:  # open_clip, its hub client and safetensors each raise their own
        raise unloadable(source, error) from error
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
    return bool(description_of(source.folder).get("model_cfg", {}).get(NEEDS_PAIRMILL))


def _load_model(source: ModelSource) -> Any:
    if source.folder is not None and _is_ours_alone(source):
        return load_clip(source.folder)
    return open_clip.create_model(source.name, pretrained=source.tag, require_pretrained=True)


def _preprocessing(source: ModelSource, model: Any) -> PreprocessCfg:
    if _is_ours_alone(source):
        side = model.visual.image_size
        return PreprocessCfg(**{**description_of(source.folder)["preprocess_cfg"], "size": side})
    return PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))


def _tokenizer(source: ModelSource) -> Callable[[list[str]], Tensor]:
    # A foreign folder's tokenizer.json may want cleaning or padding that only open_clip knows of.
    ours = "pairmill" in description_of(source.folder)
    if ours and source.folder is not None and (source.folder / TOKENIZER_FILE).is_file():
        return Tokenizer.load(source.folder)
    tokenizer: Callable[[list[str]], Tensor] = open_clip.get_tokenizer(source.name)
    return tokenizer
