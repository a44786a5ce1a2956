"""The trainer against open_clip_train: the same tars, model and batch, in turn, in one process.

    python -m tools.benchmark.trainer [--steps 8] [--repeats 3] [--batch 16] [--width 128]

1. samples/s of both loops, data included, for every mask ratio and context length; open_clip with
   `patch_dropout` and `context_length`. Beside it our step's time relative to the unmasked one and
   what the FLOP count (pretrain/estimate.py) predicts of it.
2. Where our step goes: forward and loss, backward, optimizer, data; the rest is the framework's.

One thread, no workers, fp32, no clipping, a log line every 100 steps, as open_clip's defaults. Wall
seconds are those of a machine that may be shared; CPU seconds are less disturbed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")  # before torch is imported

import torch

from configs.load import validate
from curation.manifest import Manifest
from pretrain.build import stage_model_config
from pretrain.config import PretrainConfig
from pretrain.data.batch import Batch
from pretrain.engine import start_processes, stop_processes
from pretrain.estimate import step_flops
from pretrain.model.clip import ClipModel
from pretrain.model.torchvision_ops import ensure_torchvision
from pretrain.objectives import Total
from pretrain.ranks import StopRequest
from pretrain.run import Run
from pretrain.stages import Stages
from pretrain.train import start
from tools.benchmark.data import make_shards, photographs
from tools.benchmark.ratio import Ratio, alternate

_CASES = [(mask, length) for length in (77, 16) for mask in (0.0, 0.5, 0.75)]
_CAPTION = "a photograph of a {} beside an old wooden house in the mountains, taken in the morning"
_WORDS = ("dog", "red bicycle", "market", "horse", "sailing boat", "church", "garden", "train")


def model_json(options: argparse.Namespace, context_length: int) -> dict[str, Any]:
    """Return the model config of both."""
    width, patch = options.width, 8
    vision = {"image_size": 64, "patch_size": patch, "width": width, "head_width": 32}
    text = {"context_length": context_length, "vocab_size": 49_408, "width": width, "heads": 4}
    towers = {"vision_cfg": {**vision, "layers": 4}, "text_cfg": {**text, "layers": 4}}
    return {"embed_dim": width, **towers}


class Ours:
    """A run of ours that goes on for as many steps as it is asked for."""

    def __init__(
        self, options: argparse.Namespace, data: Manifest, folder: Path, mask: float, length: int
    ) -> None:
        name = f"{mask}-{length}"
        (folder / f"{name}.json").write_text(json.dumps(model_json(options, length)))
        tree = {
            "name": name,
            "output": str(folder / f"run-{name}"),
            "data": {"manifest": str(data.folder), "num_workers": 0, "window_shards": 2},
            "model": str(folder / f"{name}.json"),
            "tokenizer": {"name": "clip"},
            "objective": {"name": "clip"},
            "reduction": {"name": "random", "mask_ratio": mask},
            "optimizer": {"learning_rate": 1.0e-3, "clipping": {"name": "none"}},
            "engine": {"zero_stage": options.zero_stage, "num_threads": 1},
            "global_batch_size": options.batch,
            "samples": 1_000_000 * options.batch,
            "intervals": {"log_samples": 100 * options.batch, "checkpoint_samples": 10**12},
        }
        self.config = validate(tree, PretrainConfig, label="benchmark")
        stages = Stages.of(self.config)
        self.flops = step_flops(stages.at(0), stage_model_config(stages.at(0).config))
        self.run: Run = start(self.config, stages, start_processes(1), None, None)
        self._stop = StopRequest(None)
        self._stop.restore_handlers()  # a signal ends the benchmark
        self._source = self.run.parts.batches(
            first=0, last=self.run.stage.last_sample, num_workers=0
        )

    def steps(self, number: int) -> None:
        """Take steps as pretrain/train.py's loop does."""
        run = self.run
        for _ in range(number):
            batch = run.fetch(self._source)
            self._stop.agreed(run.step_number)
            assert isinstance(batch, Batch), batch
            run.step(batch)
            run.parts.engine.stability.must_go_back(at_end=False)
            run.evaluate()
            run.checkpoint_due()

    def close(self) -> None:
        """Let go of the engine."""
        self.run.close()
        self.run.parts.engine.close()


class Theirs:
    """open_clip_train's own loop over its own loader, cut into pieces of some steps."""

    def __init__(
        self, options: argparse.Namespace, data: Manifest, mask: float, length: int
    ) -> None:
        ensure_torchvision()
        import open_clip
        from open_clip_train import data as their_data
        from open_clip_train import scheduler
        from open_clip_train.params import parse_args

        # Its tar reader does not know the end marks that webdataset 1.0 puts between shards.
        expander = their_data.tar_file_expander
        their_data.tar_file_expander = partial(getattr(expander, "func", expander), eof_value=None)

        last = len(data.samples_per_shard) - 1
        self.args = parse_args(
            [
                *("--train-data", f"{data.folder}/{{00000..{last:05d}}}.tar"),
                *("--train-num-samples", str(10**9), "--dataset-type", "webdataset"),
                *("--batch-size", str(options.batch), "--workers", "0", "--precision", "fp32"),
                *("--lr", "1e-3", "--warmup", "1"),
            ]
        )
        vars(self.args).update(
            device="cpu", rank=0, local_rank=0, world_size=1, distributed=False, distill=False,
            wandb=False, tensorboard=False, horovod=False,
        )  # fmt: skip
        config = model_json(options, length)
        config["vision_cfg"]["patch_dropout"] = mask
        self.model = open_clip.CLIP(**config, output_dict=True)
        self._loss = open_clip.ClipLoss()
        named = list(self.model.named_parameters())
        plain = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n]
        others = [p for _, p in named if all(p is not q for q in plain)]
        self._optimizer = torch.optim.AdamW(
            [{"params": plain, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.2}],
            lr=1e-3, betas=(0.9, 0.98), eps=1e-6,
        )  # fmt: skip
        self._scheduler = scheduler.cosine_lr(self._optimizer, 1e-3, 1, 10**6)
        preprocess = open_clip.image_transform(64, is_train=True)
        tokenizer = open_clip.SimpleTokenizer(context_length=length)
        found = their_data.get_data(self.args, (preprocess, preprocess), tokenizer=tokenizer)
        self._loader = found["train"].dataloader
        self._batches = iter(self._loader)

    def steps(self, number: int) -> None:
        """Take steps in open_clip's train_one_epoch."""
        from open_clip_train.train import train_one_epoch

        piece = _Piece(self._batches, number, number * self.args.batch_size)
        data = {"train": SimpleNamespace(dataloader=piece, set_epoch=lambda epoch: None)}
        scheduler = self._scheduler
        train_one_epoch(
            self.model, data, self._loss, 0, self._optimizer, None, scheduler, None, self.args
        )


class _Piece:
    """The next batches of a loader, as open_clip's loop wants a loader."""

    def __init__(self, batches: Iterator[Any], num_batches: int, num_samples: int) -> None:
        self._batches = batches
        self.num_batches, self.num_samples = num_batches, num_samples

    def __iter__(self) -> Iterator[Any]:
        return islice(self._batches, self.num_batches)


@contextmanager
def stop_watches(run: Run, spent: dict[str, float]) -> Iterator[None]:
    """Add the CPU seconds of this thread in the parts of a step to `spent`."""
    inside = [False]

    def timed(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if inside[0]:  # a part within a part counts once
                return function(*arguments, **named)
            inside[0], began = True, time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                spent[kind] += time.thread_time() - began
                inside[0] = False

        return wrapped

    optimizer = run.parts.engine.partitions.optimizer
    places: list[tuple[Any, str, str]] = [
        (ClipModel, "forward", "forward"), (Total, "__call__", "forward"),
        (torch.Tensor, "backward", "backward"), (Run, "fetch", "data"),
        (type(optimizer), "step", "optimizer"),
    ]  # fmt: skip
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    for owner, name, kind in places:
        setattr(owner, name, timed(kind, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def parts_of_a_step(ours: Ours, steps: int) -> dict[str, float]:
    """Return the CPU seconds of a step by what they go to."""
    spent: dict[str, float] = defaultdict(float)
    with stop_watches(ours.run, spent):
        began = time.thread_time()
        ours.steps(steps)
        whole = time.thread_time() - began
    found = {kind: spent[kind] / steps for kind in ("forward", "backward", "optimizer", "data")}
    return {**found, "framework": whole / steps - sum(found.values()), "step": whole / steps}


def compare(
    options: argparse.Namespace, data: Manifest, folder: Path
) -> list[tuple[float, int, Ratio, dict[str, float], int]]:
    """Return a row for every case: ratio to open_clip, parts of our step, FLOPs of a sample."""
    found = []
    for mask, length in _CASES:
        ours = Ours(options, data, folder, mask, length)
        theirs = Theirs(options, data, mask, length)
        for loop in (ours, theirs):
            loop.steps(2)  # buffers fill, tables are built
        name = f"mask {mask:.0%}, {length} tokens"
        loops = [partial(loop.steps, options.steps) for loop in (ours, theirs)]
        ratio = alternate(name, *loops, repeats=options.repeats)
        rows = [parts_of_a_step(ours, options.steps) for _ in range(options.repeats)]
        parts = {kind: statistics.median(row[kind] for row in rows) for kind in rows[0]}
        found.append((mask, length, ratio, parts, ours.flops))
        ours.close()
        print(ratio.line(1.0), file=sys.stderr, flush=True)
    return found


def report(
    rows: list[tuple[float, int, Ratio, dict[str, float], int]], options: argparse.Namespace
) -> None:
    """Print both tables."""
    samples = options.steps * options.batch
    base, base_flops = next((p, f) for mask, length, _, p, f in rows if (mask, length) == (0, 77))
    print(f"{'':<20} samples/s  open_clip   wall    CPU | of the unmasked: FLOPs  towers   step")
    for _, _, ratio, parts, flops in rows:
        towers = [each["forward"] + each["backward"] for each in (parts, base)]
        print(
            f"{ratio.name:<20} {samples / ratio.ours_s:>9.1f}  {samples / ratio.theirs_s:>9.1f} "
            f"{ratio.ratio:>5.2f}x {ratio.cpu_ratio:>5.2f}x | {flops / base_flops:>22.2f} "
            f"{towers[0] / towers[1]:>7.2f} {parts['step'] / base['step']:>6.2f}"
        )
    print(f"\n{'CPU ms of our step':<20} " + "".join(f"{kind:>10}" for kind in base) + "     share")
    for _, _, ratio, parts, _ in rows:
        line = "".join(f"{1e3 * seconds:>10.1f}" for seconds in parts.values())
        print(f"{ratio.name:<20} {line} {parts['framework'] / parts['step']:>9.1%}")


def main() -> None:
    """Make the data, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--zero-stage", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        captions = [_CAPTION.format(word) for word in _WORDS]
        data = make_shards(folder / "data", photographs(None), captions, options.samples)
        report(compare(options, data, folder), options)
    stop_processes()


if __name__ == "__main__":
    main()
