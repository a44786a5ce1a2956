"""CONFIG FAULT: train as `pairmill pretrain CONFIG` does, with one fault on the way.

FAULT is JSON: `kind`, the `rank` it hits, and when. A kill is a real SIGKILL of the own process at
the named place; nothing of what is tested is replaced. At step NAN_STEP of every run the features
of rank 0 are not finite.
"""

import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from pretrain import checkpoint, saving, training_state
from pretrain.data.remote import Cache
from pretrain.engine import Engine
from pretrain.model.clip import ClipModel
from pretrain.run import Run

NAN_STEP = 4


def kill(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def before(owner, name: str, action, *, skip: int = 0, in_thread: str | None = None) -> None:
    """Have `action(*arguments)` done before the call number `skip` of owner.name."""
    original, left = getattr(owner, name), [skip]

    def wrapped(*arguments, **named):
        if in_thread in (None, threading.current_thread().name):
            if left[0] == 0:
                action(*arguments)
            left[0] -= 1
        return original(*arguments, **named)

    setattr(owner, name, wrapped)


def half_written(path: Path, tensors, layout) -> None:
    write_state(path, tensors, layout)
    os.truncate(path, path.stat().st_size // 2)
    kill()


def half_fetched(cache, url, path, descriptor, num_bytes) -> None:
    os.pwrite(descriptor, b"x" * (num_bytes // 2), 0)
    kill()


def fill(run, batch) -> None:
    with open(Path(run.config.output) / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 65_536)
        except OSError:
            pass


def install(fault: dict) -> None:
    step = fault.get("step", 0)
    if fault["kind"] == "signal":
        before(Run, "step", lambda *_: kill(fault["number"]), skip=step)
        if fault.get("again"):  # while the last checkpoint is being saved
            before(training_state, "write_state", lambda *_: kill(fault["number"]), skip=step // 2)
    elif fault["kind"] == "fill":
        before(Run, "step", fill, skip=step)
    elif fault["kind"] == "fetch":
        before(Cache, "_fetch", half_fetched, skip=step)
    elif fault["kind"] == "latest":
        before(checkpoint, "publish_latest", lambda *_: kill(), in_thread="checkpoint")
    elif fault["kind"] == "save":
        owner, name, action = {
            "write": (training_state, "write_state", half_written),
            "report": (saving, "publish_text", lambda *_: kill()),
            "export": (ClipModel, "save", lambda *_: kill()),
            "seal": (checkpoint, "seal", lambda *_: kill()),
            "rename": (saving, "publish_folder", lambda *_: kill()),
        }[fault["place"]]
        before(owner, name, action, in_thread="checkpoint")


def spoil_one_step() -> None:
    forward, take_step, now = Engine.forward, Run.step, [0]

    def noting(run, batch):
        now[0] = run.step_number
        take_step(run, batch)

    def spoiled(engine, *inputs, **named):
        features = forward(engine, *inputs, **named)
        if now[0] == NAN_STEP and torch.is_grad_enabled() and os.environ["RANK"] == "0":
            return features._replace(image_bD=features.image_bD * float("nan"))
        return features

    Run.step, Engine.forward = noting, spoiled


if __name__ == "__main__":
    write_state = training_state.write_state
    spoil_one_step()
    asked = json.loads(sys.argv[2])
    if str(asked.get("rank", 0)) == os.environ["RANK"]:
        install(asked)
    from tools.cli import main

    sys.exit(main(["pretrain", sys.argv[1]]))
