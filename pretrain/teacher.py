"""A frozen teacher beside the student: a pairmill model that sees the same pixels and tokens."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from pretrain.checkpoint import model_folder, verify_model
from pretrain.model.clip import ClipModel, load_clip
from pretrain.model.patches import PatchGather
from pretrain.model.similarity import CONFIG_FILE, load_similarity
from pretrain.model.tokenizer import TOKENIZER_FILE, Tokenizer


class Teacher(nn.Module):
    """Unit features of images and texts, and the logit scale; never trained."""

    def __init__(self, checkpoint: str) -> None:
        """Load the model that `checkpoint` means: a run, a checkpoint, or a model folder."""
        super().__init__()
        folder = model_folder(Path(checkpoint))
        verify_model(folder)
        if load_similarity(folder).name != "cosine":
            raise ConfigError(
                f"teacher {checkpoint}: its geometry is {load_similarity(folder).name}; the "
                "distillation objectives compare by cosine. Choose a teacher trained with it."
            )
        self.folder = folder
        self.clip = load_clip(folder).eval().requires_grad_(False)
        self.clip.visual.patch_dropout = PatchGather()  # takes everything
        description = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        self.embed_dim = int(description["model_cfg"]["embed_dim"])
        self.image_size = int(description["model_cfg"]["vision_cfg"]["image_size"])

    def check_fits(self, model: ClipModel, tokenizer: Tokenizer) -> None:
        """Raise ConfigError unless teacher and student read the same pixels and token ids."""
        if self.image_size != model.image_size:
            raise ConfigError(
                f"teacher {self.folder} takes images of {self.image_size} px, the model of "
                f"{model.image_size} px: choose a model or a teacher of the same size."
            )
        theirs = Tokenizer.load(self.folder)
        if theirs.to_json() != tokenizer.to_json():
            raise ConfigError(
                f"teacher {self.folder} has another tokenizer ({TOKENIZER_FILE}) than this run "
                f"({theirs.vocab_size:,} and {tokenizer.vocab_size:,} entries, "
                f"{theirs.context_length} and {tokenizer.context_length} tokens): train on the "
                "teacher's dataset with its `tokenizer` section and context length."
            )

    @torch.no_grad()
    def forward(self, pixels_b3HW: Tensor, token_bL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return image features [b, E] and text features [b, E] of length 1, and exp(s) [1].

        The pixels are normalized ones, as ClipModel.pixels gives them.
        """
        pixels_b3HW = pixels_b3HW.to(self.clip.visual.conv1.weight.dtype)
        return (
            self.clip.encode_image(pixels_b3HW, normalize=True),
            self.clip.encode_text(token_bL, normalize=True),
            self.clip.logit_scale.exp(),
        )
