"""`pairmill export`: a checkpoint's model as a folder that other libraries load."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "Export a checkpoint's model: a folder that open_clip, timm or transformers load."
EPILOG = """examples:
  pairmill export runs/demo/pretrain exported
  python -c "import open_clip; open_clip.create_model_and_transforms('local-dir:exported')"

  pairmill export runs/demo/pretrain exported-hf --form=huggingface
  python -c "import transformers; transformers.CLIPModel.from_pretrained('exported-hf')"

Weights are safetensors, the tokenizer is with them. timm reads the image tower from open_clip's
form: its vision_transformer.checkpoint_filter_fn maps the names (tests/pretrain/test_interop.py).
(beside a CPU build of torch, `import pretrain.model.clip` first, so that torchvision imports)"""
_FORMS = ("open_clip", "huggingface")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run or a checkpoint")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the folder to make")
    parser.add_argument(
        "--form", choices=_FORMS, default=_FORMS[0], help="who is to load it (default: open_clip)"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    if options.form == "huggingface":
        from pretrain.huggingface import export_huggingface as export
    else:
        from pretrain.checkpoint import export_model as export
    print(export(options.checkpoint, options.folder))
    return 0
