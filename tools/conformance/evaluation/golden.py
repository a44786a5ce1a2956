"""One golden file: arrays as tensors, numbers, and the few-shot inputs that belong to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from configs.errors import DataError
from evaluation.methods.few_shot import FewShotTask, Labelled, labelled
from pretrain.model.geometries import Cosine

SCORE_RTOL = 2e-4  # logits and scores (the goldens' README)
LOOSE_RTOL = 2e-3  # what goes through a float32 pinv: GDA, Mahalanobis
EXACT = 1e-6  # accuracies, recalls, FPR95, AUROC
LOSS_ATOL = 1e-3  # losses along a training
SCALE = 100.0


class MissingInputsError(DataError):
    """The few-shot inputs of a golden are not beside it."""


@dataclass(frozen=True)
class Golden:
    """A golden file and its folder."""

    path: Path
    arrays: dict[str, npt.NDArray[Any]]

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Read all arrays; no pickle is loaded."""
        with np.load(path, allow_pickle=False) as file:
            return cls(path, {name: file[name] for name in file.files})

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    def __contains__(self, key: object) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> npt.NDArray[Any]:
        return self.arrays[key]

    def number(self, key: str, default: float | None = None) -> float:
        """Return one number."""
        if key not in self.arrays and default is not None:
            return default
        return float(self.arrays[key])

    def tensor(self, key: str) -> Tensor:
        """Return an array as a tensor of its own precision."""
        return torch.from_numpy(np.ascontiguousarray(self.arrays[key]))

    def inputs(self, default: str = "d64_s16") -> Golden:
        """Return the few-shot inputs whose size the file's name ends with (`d64_s16`)."""
        found = re.findall(r"d\d+_s\d+", self.name)
        path = self.path.with_name(f"fewshot_inputs_{found[-1] if found else default}.npz")
        others = sorted(self.path.parent.glob("fewshot_inputs_*.npz"))
        if not found and not path.is_file() and len(others) == 1:
            path = others[0]  # a name without a size, and one size there
        if not path.is_file():
            raise MissingInputsError(f"its inputs {path.name} are not in the folder")
        return Golden.read(path)


def task_of(inputs: Golden) -> tuple[FewShotTask, Labelled, Labelled]:
    """Return the shots, validation and test of few-shot inputs; class vectors are stored D x C."""
    class_CD = inputs.tensor("clip_weights").T.contiguous()
    cosine = Cosine()

    def part(split: str) -> Labelled:
        aux = inputs.tensor(f"aux_{split}") if f"aux_{split}" in inputs else None
        label_n = inputs.tensor(f"{split}_y").long()
        return labelled(inputs.tensor(f"{split}_x"), label_n, class_CD, cosine, SCALE, aux)

    return FewShotTask(part("train"), class_CD, cosine, SCALE, seed=0), part("val"), part("test")
