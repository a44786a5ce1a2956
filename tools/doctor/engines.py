"""torch and its devices, DeepSpeed, Ray, Slurm."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec

from tools.doctor.findings import Finding, note, ok, problem

_SECONDS = 20.0


def check_torch() -> Iterator[Finding]:
    """Look at torch, torchvision, DeepSpeed and the devices; it imports them (seconds)."""
    if find_spec("torch") is None:
        yield note("torch", "not installed", "pip install 'pairmill[pretrain]', where it is wanted")
        return
    try:
        import torch
    except (ImportError, OSError) as error:
        yield problem("torch", f"cannot be imported: {error}", "install it anew")
        return
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    yield ok("torch", f"{torch.__version__}, {built}, {torch.get_num_threads()} threads")
    yield from _check_devices()
    for module, needed in (
        ("pretrain.model.clip", "models (torchvision, open_clip)"),
        ("pretrain.adapter", "training (deepspeed)"),
    ):
        yield _imports(module, needed)


def _check_devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(number)
            half = "bf16" if device.major >= 8 else "fp16 alone: engine.precision=fp16"
            memory = device.total_memory / 2**30
            yield ok("gpu", f"{number}: {device.name}, {memory:.0f} GiB, {half}")
    elif shutil.which("nvidia-smi"):
        yield problem(
            "gpu",
            "nvidia-smi is there, but torch sees no GPU",
            "a CPU build of torch, a driver older than its CUDA, or CUDA_VISIBLE_DEVICES="
            f"{os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}",
        )
    else:
        yield note("gpu", "none: training and evaluation run on the CPU", "well for small models")


def _imports(module: str, needed: str) -> Finding:
    try:
        __import__(module)
    except Exception as error:  # a library that fails to load raises whatever it likes
        what = f"{needed}: {type(error).__name__}: {error}"
        return problem("torch", what, "torch, torchvision and deepspeed must fit: make setup")
    return ok("torch", f"{needed} can be imported")


def check_ray() -> Iterator[Finding]:
    """Start Ray with one worker and run a task, or see whether RAY_ADDRESS answers."""
    address = os.environ.get("RAY_ADDRESS")
    if address and address != "local":
        yield _answers(address.removeprefix("ray://"))
        return
    from configs.errors import PairmillError
    from curation.config import EngineConfig
    from curation.engine import Engine

    try:
        with Engine(EngineConfig(num_workers=1)) as engine:
            [(_, done)] = engine.map(_count, [3], label="ray")
    except (PairmillError, OSError) as error:
        yield problem("ray", str(error), "look at the newest session_* in /tmp/ray, logs/")
        return
    yield ok("ray", f"started here, and ran a task in another process ({done.num_samples} of 3)")


class _Done:
    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples


def _count(number: int) -> _Done:
    return _Done(number)


def _answers(address: str) -> Finding:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=_SECONDS):
            return ok("ray", f"RAY_ADDRESS={address} answers")
    except (OSError, ValueError) as error:
        advice = "start the cluster (`ray start --head`), or unset RAY_ADDRESS to start one here"
        return problem("ray", f"RAY_ADDRESS={address} does not answer: {error}", advice)


def check_slurm() -> Iterator[Finding]:
    """Look whether Slurm's commands are there and its controller answers."""
    missing = [name for name in ("sbatch", "srun", "scontrol") if shutil.which(name) is None]
    if missing:
        found = f"{', '.join(missing)} not on PATH"
        yield note("slurm", found, "needed for `pairmill submit` alone: run it on a login node")
        return
    version = _run("sbatch", "--version")
    partitions = _run("sinfo", "--noheader", "--format=%P %D nodes")
    if partitions is None or version is None:
        yield note(
            "slurm",
            "sbatch is there, but the controller does not answer",
            "nothing can be submitted from here: see `scontrol ping`",
        )
        return
    yield ok("slurm", f"{version}; {', '.join(partitions.splitlines()) or 'no partition'}")


def _run(*words: str) -> str | None:
    """Return what a command prints; None where it fails or takes too long."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
