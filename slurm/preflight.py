"""Check a node before a long job: in seconds, with the node's name, all that is wrong at once.

    srun --ntasks-per-node=1 python -m slurm.preflight --import=pretrain.train CONFIG [KEY=VALUE]

Each node: free disk, the import of what the job runs, GPUs, the port on the first node; where torch
came with the import, one tiny all-reduce over all nodes.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from configs.errors import PairmillError
from configs.load import resolve
from slurm.network import choose_gloo_interface

_MIN_FREE_GB = "PAIRMILL_MIN_FREE_GB"
_REDUCE_SECONDS = 180  # also for nodes that import more slowly than others


def existing_parent(path: Path) -> Path:
    """Return the path or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_disk(folders: Sequence[Path]) -> Iterator[str]:
    """Yield what is wrong with the folders that the job writes to."""
    wanted = float(os.environ.get(_MIN_FREE_GB, "1"))
    for folder in folders:
        there = existing_parent(folder)
        free = shutil.disk_usage(there).free / 1e9
        if not os.access(there, os.W_OK):
            yield f"{there} cannot be written to (for {folder})"
        elif free < wanted:
            yield (
                f"{there} has {free:.2f} GB free, expected at least {wanted:g} ({_MIN_FREE_GB}). "
                "Free some, or write elsewhere (output=..., TMPDIR)"
            )


def check_import(module: str) -> Iterator[str]:
    """Yield why what the job runs cannot be imported."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a library that fails to load raises whatever it likes
        yield f"{sys.executable} cannot import {module}: {type(error).__name__}: {error}"


def check_gpus(expected: int) -> Iterator[str]:
    """Yield how the GPUs that torch sees differ from what Slurm gave."""
    import torch

    found = torch.cuda.device_count()
    if found < expected:
        yield (
            f"torch {torch.__version__} sees {found} of {expected} GPUs "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}): look at "
            "nvidia-smi there, and whether this torch is a CUDA build"
        )


def check_port(port: int) -> Iterator[str]:
    """Yield whether the first node's port is taken."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError as error:
            yield f"port {port} is taken ({error.strerror}): set MASTER_PORT to another"


def check_all_reduce(rank: int, size: int, address: str, port: int) -> Iterator[str]:
    """Yield why the nodes cannot add up their ranks."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    choose_gloo_interface(address)
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"tcp://{address}:{port}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=_REDUCE_SECONDS),
        )
        total = torch.tensor([float(rank)], device=device)
        dist.all_reduce(total)
        value = float(total.item())
        dist.barrier()
        dist.destroy_process_group()
    except Exception as error:  # torch raises many kinds
        yield (
            f"no all-reduce with {address}:{port} over {size} nodes: {error}. Is that address "
            "reachable from here? GLOO_SOCKET_IFNAME="
            f"{os.environ.get('GLOO_SOCKET_IFNAME', 'unset')}, "
            f"NCCL_SOCKET_IFNAME={os.environ.get('NCCL_SOCKET_IFNAME', 'unset')}"
        )
        return
    if value != size * (size - 1) / 2:
        yield f"the all-reduce of 0..{size - 1} gave {value}"


def check_folders(words: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the folders that a configuration writes to, and with itself."""
    folders = [Path(os.environ.get("TMPDIR", "/tmp"))]
    overrides = [word for word in words if "=" in word and not Path(word).exists()]
    *_, config = [word for word in words if word not in overrides]
    try:
        output = resolve(config, overrides).get("output")
        folders += [Path(str(output))] if output else []
    except PairmillError as error:
        yield f"in {Path.cwd()}: {error}"
    yield from check_disk(folders)


def problems(module: str, words: Sequence[str]) -> list[str]:
    """Return all that is wrong on this node; the all-reduce only where nothing else is."""
    node = int(os.environ.get("SLURM_NODEID", "0"))
    size = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    port = os.environ.get("MASTER_PORT")
    found = [*check_folders(words), *check_import(module)]
    uses_torch = "torch" in sys.modules
    if uses_torch:
        found += check_gpus(int(os.environ.get("SLURM_GPUS_ON_NODE") or 0))
    if port is not None and node == 0:
        found += check_port(int(port))
    if not found and uses_torch and size > 1 and port is not None:
        found += check_all_reduce(node, size, os.environ["MASTER_ADDR"], int(port))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, and print one line for each problem, or one that all is well."""
    parser = argparse.ArgumentParser(prog="python -m slurm.preflight", description=__doc__)
    parser.add_argument("--import", required=True, dest="module", help="what the job runs")
    parser.add_argument("words", nargs="+", metavar="CONFIG", help="and its overrides")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    host = socket.gethostname()
    found = problems(options.module, options.words)
    for problem in found:
        print(f"preflight: {host}: {problem}", file=sys.stderr, flush=True)
    if not found:
        print(f"preflight: {host}: well, {time.monotonic() - started:.1f} s", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
