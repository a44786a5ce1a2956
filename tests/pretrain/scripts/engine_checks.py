"""CONFIG FOLDER CHECK...: checks of the engine that need their own number of ranks.

Each check saves what rank 0 found to FOLDER/CHECK-WORLD.pt; test_engine.py compares.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from configs.load import load_config
from pretrain.accumulation import backward
from pretrain.clipping import clippings
from pretrain.config import PretrainConfig
from pretrain.engine import Engine, start_processes
from pretrain.objectives.group import world_or_solo
from pretrain.training_state import Snapshot, load_state
from tests.pretrain.objective_rows import ROWS, inputs_of, model_of, total_of

STAGES = (0, 1, 2, 3)
GOLDEN = Path(__file__).resolve().parents[2] / "golden/objectives/gradclip.npz"
NUM_NORMS = 155  # of 400: with the spikes at 10, 40, 41, 90 and 150; one case,
NUM_NORMS_OF_OTHERS = 95  # the others as far as the fourth
CLIPPINGS = {
    "zclip/default": ("zclip", {"max_norm": 1.0}),
    "zclip/mean": ("zclip", {"spike": "mean"}),
    "autoclip/p10": ("autoclip", {"percentile": 10.0}),
}


def cut(size: int, micro: int, row) -> list[dict[str, object]]:
    """The keywords of ClipModel.forward of this rank's micro-batches, of equal size."""
    group = world_or_solo()
    local = size // group.size
    starts = range(group.rank * local, (group.rank + 1) * local, micro)
    return [inputs_of(size, total_of(row[0]), slice(start, start + micro)) for start in starts]


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
MODES = {"checkpointed": {"activation_checkpointing": True}, "offloaded": {"deepspeed": OFFLOAD}}


def engine_of(
    config, row, stage: int, mode: str = "fp32", *, layers: int = 1, **optimizer
) -> tuple:
    """An engine with the tiny model of one row of objectives, and its loss.

    `mode` is a precision, or one of MODES. A step costs what Python does for each layer.
    """
    total = total_of(row[0])
    changes = MODES.get(mode) or {"precision": mode}
    section = config.engine.model_copy(update={"zero_stage": stage, **changes})
    changed = config.optimizer.model_copy(update=optimizer)
    config = config.model_copy(update={"engine": section, "optimizer": changed})
    engine = Engine(model_of(row[1], total, layers), config, torch.device("cpu"))

    def compare(features):
        return total(features, similarity=engine.model.similarity, group=world_or_solo())

    return engine, compare


def states_of(engine) -> list[dict[str, torch.Tensor]]:
    """What this rank holds of the optimizer's state."""
    optimizer = engine._deepspeed._engine.optimizer
    if engine.zero_stage > 0:  # one state a group
        return [state for state in optimizer.optimizer.state.values() if state]
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return [optimizer.state[p] for p in parameters if optimizer.state.get(p)]


def gradients(config) -> list:
    """Gradients before the optimizer: every stage, the whole batch at once and in micro-batches."""
    found = []
    world_size = world_or_solo().size
    local = config.global_batch_size // world_size
    for stage in STAGES:
        rows = (ROWS[6], ROWS[9], ROWS[16], ROWS[17]) if stage == 2 else (ROWS[6],)
        for micro in (local, local // 2) if world_size < 4 else (local // 2,):
            for row in rows:
                engine, compare = engine_of(config, row, stage, layers=2)
                backward(engine, cut(config.global_batch_size, micro, row), compare)
                own = {n: g.clone() for n, g in engine.gradients().items()}
                norm = engine.step(0.0).gradient_norm
                found.append((f"{row[0]} {row[1]}", stage, local // micro, own, norm))
        if stage in (0, 3) and world_size == 2:
            engine, compare = engine_of(config, ROWS[6], stage, "checkpointed", layers=2)
            backward(engine, cut(config.global_batch_size, local // 2, ROWS[6]), compare)
            own = {n: g.clone() for n, g in engine.gradients().items()}
            norm = engine.step(0.0).gradient_norm
            found.append((f"{ROWS[6][0]} {ROWS[6][1]}", stage, 2, own, norm))
    return found


def repeated(config) -> list:
    """Negative control: backward passes of two micro-batches without an explicit boundary."""
    found = []
    for stage in (1, 2):
        engine, compare = engine_of(config, ROWS[6], stage, layers=2)
        inner, size = engine._deepspeed._engine, config.global_batch_size
        inner.set_gradient_accumulation_boundary = lambda is_boundary: None
        backward(engine, cut(size, size // world_or_solo().size // 2, ROWS[6]), compare)
        found.append((stage, {n: g.clone() for n, g in engine.gradients().items()}))
    return found


def descent(config) -> list:
    """Weights after 20 steps of plain SGD, in two micro-batches a rank.

    Two cases get their whole batch at once: the first, which the others are compared with, and
    stage 3 on four ranks, where a pass is mostly waiting for weights.
    """
    found, size = [], config.global_batch_size
    group = world_or_solo()
    for stage in STAGES:
        engine, compare = engine_of(config, ROWS[0], stage, name="sgd", weight_decay=0.0)
        num_micro_batches = 1 if (stage, group.size) in {(0, 1), (3, 4)} else 2
        parts = cut(size, size // group.size // num_micro_batches, ROWS[0])
        for _ in range(20):
            backward(engine, parts, compare)
            engine.step(0.01)
        found.append((stage, {n: w.clone() for n, w in engine.weights().items()}))
    return found


def not_finite(config) -> list:
    """A loss that is not finite on the last rank alone: what the others did, and the next step."""
    found, group, size = [], world_or_solo(), config.global_batch_size
    for stage, precision in [(stage, "fp32") for stage in STAGES] + [(1, "bf16"), (2, "bf16")]:
        engine, compare = engine_of(config, ROWS[0], stage, precision)
        parts = cut(size, size // group.size // 2, ROWS[0])

        def spoilt(features, compare=compare):
            loss = compare(features)
            bad = loss.loss + (torch.inf if group.rank == group.size - 1 else 0.0)
            return loss._replace(loss=bad)

        backward(engine, parts, compare)
        engine.step(1e-3)
        before = {n: w.clone() for n, w in engine.weights().items()}
        backward(engine, parts, spoilt)
        skipped = engine.step(1e-3)
        same = all(torch.equal(w, before[n]) for n, w in engine.weights().items())
        backward(engine, parts, compare)
        after = engine.step(1e-3)
        moved = any(not torch.equal(w, before[n]) for n, w in engine.weights().items())
        found.append((stage, precision, tuple(skipped), same, tuple(after), moved))
    return found


def resumed(config) -> list:
    """Two steps, saved, and two more; against the same two in a new engine that loaded."""
    found, size = [], config.global_batch_size
    parts = cut(size, size // world_or_solo().size // 2, ROWS[6])
    zclip = clippings.section("zclip")(name="zclip", warmup_steps=2, z_threshold=0.1)
    sequence = [(stage, "fp32") for stage in STAGES]
    sequence += [(1, "bf16"), (3, "bf16"), (1, "offloaded"), (2, "offloaded"), (3, "offloaded")]
    for stage, precision in sequence:
        folder = Path(sys.argv[2]) / f"state-{stage}-{precision}-{world_or_solo().size}"
        states = []
        engine, compare = engine_of(config, ROWS[6], stage, precision, clipping=zclip)
        for half in range(2):
            for _ in range(2):
                backward(engine, parts, compare)
                engine.step(1e-2)
            if half == 0:
                snapshot, rank = Snapshot(), world_or_solo().rank
                snapshot.take(engine.partitions, None)
                folder.mkdir(exist_ok=True)
                snapshot.write(folder, rank)
                extra = json.loads(json.dumps(engine.extra_state()))
                dist.barrier()
        for again in range(2):
            if again:
                engine, compare = engine_of(config, ROWS[6], stage, precision, clipping=zclip)
                load_state(folder, engine.partitions, None, rank)
                engine.load_extra_state(extra)
                for _ in range(2):
                    backward(engine, parts, compare)
                    engine.step(1e-2)
            weights = {n: w.clone() for n, w in engine.weights().items()}
            moments = [s["exp_avg"].clone() for s in states_of(engine)]
            states.append((weights, moments, engine.extra_state()))
        (w1, m1, e1), (w2, m2, e2) = states
        same_weights = all(torch.equal(w1[name], w2[name]) for name in w1)
        same_moments = len(m1) == len(m2) and all(map(torch.equal, m1, m2))
        found.append((stage, precision, same_weights, same_moments, e1, e2))
    return found


def golden(config) -> list:
    """Golden sequences of norms through forward, loss, backward and step of the engine.

    AdamW with beta1 = 0 keeps the gradient that it was given as its first moment, and a learning
    rate of 0 the weights: so the loss times norm / first norm has a gradient of that norm, and
    what was made of it can be read.
    """
    found = []
    with np.load(GOLDEN) as arrays:
        all_norms = arrays["seq/grad_norm"].tolist()
    row = ({"name": "clip"}, {"name": "cosine"})
    parts = cut(4, 4 // world_or_solo().size, row)
    for case, (name, keywords) in CLIPPINGS.items():
        for stage in (0, 2) if case == "zclip/default" else (2,):
            section = clippings.section(name)(name=name, **keywords)
            engine, compare = engine_of(config, row, stage, clipping=section, beta1=0.0)
            backward(engine, parts, compare)
            first = engine.step(0.0).gradient_norm
            engine.clipping = section.build()  # its history begins with the sequence
            rows = []
            is_first = (case, stage) == ("zclip/default", 2)
            for norm in all_norms[: NUM_NORMS if is_first else NUM_NORMS_OF_OTHERS]:
                factor = norm / first

                def scaled(features, factor=factor, compare=compare):
                    loss = compare(features)
                    return loss._replace(loss=loss.loss * factor)

                backward(engine, parts, scaled)
                report = engine.step(0.0)
                square = sum(s["exp_avg"].double().square().sum() for s in states_of(engine))
                if stage > 0:  # each rank has its own part
                    dist.all_reduce(square)
                rows.append((report.gradient_norm, report.threshold, float(square.sqrt())))
            found.append((case, stage, rows))
    return found


if __name__ == "__main__":
    config = load_config(sys.argv[1], PretrainConfig)
    start_processes(1)
    for check in sys.argv[3:]:
        found = globals()[check](config)
        if dist.get_rank() == 0:
            torch.save(found, Path(sys.argv[2]) / f"{check}-{dist.get_world_size()}.pt")
