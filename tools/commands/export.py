"""`pairmill export`: a checkpoint's model as a folder that open_clip loads."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = (
    "Export a checkpoint's model: an open_clip folder with safetensors weights and its tokenizer."
)
EPILOG = """examples:
  pairmill export runs/demo/pretrain exported
  python -c "import open_clip; open_clip.create_model_and_transforms('local-dir:exported')"

(beside a CPU build of torch, `import pretrain.model.clip` first, so that torchvision imports)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run or a checkpoint")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the folder to make")


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    from pretrain.checkpoint import export_model

    print(export_model(options.checkpoint, options.folder))
    return 0
