"""WiSE-FT checkpoints: folders on the line between a zero-shot model and each checkpoint.

They are written once below the feature cache, named by the digests of both models and alpha, and
are then evaluated like any open_clip folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from configs.errors import CheckpointError
from configs.publish import published_folder
from evaluation.identity import ModelSource, Weights, find_model
from evaluation.methods.wise_ft import interpolate
from evaluation.tar import file_sha256

WEIGHTS_FILE = "open_clip_model.safetensors"


def interpolations(
    zero: str, checkpoints: Sequence[str], alphas: Sequence[float], folder: Path, weights: Weights
) -> list[str]:
    """Return, for each checkpoint and alpha, the folder of the model between zero and it.

    Raises CheckpointError where a model is no local folder with safetensors, or they do not fit.
    """
    return [
        str(_interpolated(zero, checkpoint, alpha, folder, weights))
        for checkpoint in checkpoints
        for alpha in alphas
    ]


def _safetensors(source: ModelSource) -> Path:
    path = None if source.folder is None else source.folder / WEIGHTS_FILE
    if path is None or not path.is_file():
        raise CheckpointError(
            f"wise_ft: {source.checkpoint} is not a local folder with {WEIGHTS_FILE}. Expected "
            "a run, a checkpoint, or an exported model."
        )
    return path


def _interpolated(zero: str, one: str, alpha: float, folder: Path, weights: Weights) -> Path:
    start, end = find_model(zero), find_model(one, weights)
    digests = "-".join(file_sha256(_safetensors(source))[:12] for source in (start, end))
    place = folder / "wise_ft" / f"{digests}-alpha{alpha:g}"
    if place.is_dir():
        return place
    merged = interpolate(load_file(_safetensors(start)), load_file(_safetensors(end)), alpha)
    assert end.folder is not None
    try:
        with published_folder(place) as temporary:
            for file in sorted(end.folder.iterdir()):
                if file.is_file() and file.name != WEIGHTS_FILE:
                    shutil.copyfile(file, temporary / file.name)
            save_file(merged, temporary / WEIGHTS_FILE)
    except OSError:
        if not place.is_dir():  # else: another task of the array was first, with the same
            raise
    return place
