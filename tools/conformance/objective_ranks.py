"""CLIP and SigLIP on several gloo ranks, with the gradients of each rank before any averaging."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from pretrain.model.features import Features
from pretrain.model.geometries import Cosine
from pretrain.objectives import objectives
from pretrain.objectives.group import world_or_solo

Array = npt.NDArray[np.float64]
Found = dict[str, Array]
_SCALE, _BIAS = 1 / 0.07, -10.0  # distributed.json


def on_ranks(size: int, pair: tuple[Array, Array]) -> tuple[list[Found], ...]:
    """Return for CLIP, SigLIP by ring and SigLIP by gather what each rank found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(  # type: ignore[no-untyped-call,attr-defined]
            _rank, args=(size, address, pair, folder), nprocs=size
        )
        files = [Path(folder) / f"{rank}.pt" for rank in range(size)]
        of_rank: list[Any] = [torch.load(file, weights_only=False) for file in files]
    return tuple([found[i] for found in of_rank] for i in range(3))


def _rank(rank: int, size: int, address: str, pair: tuple[Array, Array], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
    b = len(pair[0]) // size
    found = []
    variants: tuple[tuple[str, dict[str, Any]], ...] = (
        ("clip", {}),
        ("siglip", {"exchange": "ring"}),
        ("siglip", {"exchange": "gather"}),
    )
    for name, keywords in variants:
        inputs = {
            "img_raw": torch.tensor(pair[0][rank * b : (rank + 1) * b]),
            "txt_raw": torch.tensor(pair[1][rank * b : (rank + 1) * b]),
            "log_scale": torch.tensor([_SCALE], dtype=torch.float64).log(),
            "bias": torch.tensor([_BIAS], dtype=torch.float64),
        }
        for tensor in inputs.values():
            tensor.requires_grad_()
        image, text, log_scale, bias = inputs.values()
        loss = objectives[name](**keywords).loss(
            Features(image, text, log_scale.exp(), bias), similarity=Cosine(), group=world_or_solo()
        )
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = {
            f"grad_{key}": tensor.grad.numpy() for key, tensor in inputs.items()
            if tensor.grad is not None
        }  # fmt: skip
        found.append({"loss": loss.detach().numpy(), **gradients})
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
