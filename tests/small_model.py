"""A small open_clip model with random weights, as a folder that somebody hands over."""

from __future__ import annotations

import json
from pathlib import Path

MODEL_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def write_small_model(folder: Path) -> Path:
    """Write it; torch is imported only now."""
    import torch
    from safetensors.torch import save_file

    from pretrain.model.clip import open_clip

    torch.manual_seed(0)
    save_file(open_clip.CLIP(**MODEL_CONFIG).state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"size": [16, 16], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3]}
    description = {"model_cfg": MODEL_CONFIG, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(description))
    return folder
