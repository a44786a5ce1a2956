"""CONFIG FOLDER CHECK...: checks of the engine that need their own number of ranks.

Each check saves what rank 0 found to FOLDER/CHECK-WORLD.pt; test_engine.py compares.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from configs.load import load_config
from pretrain.accumulation import backward
from pretrain.config import PretrainConfig
from pretrain.engine import Engine, start_processes
from pretrain.objectives.group import world_or_solo
from tests.pretrain.objective_rows import ROWS, batch_of, model_of, teacher_of, total_of

STAGES = (0, 1, 2, 3)


def cut(size: int, micro: int) -> list[dict[str, object]]:
    """The keywords of ClipModel.forward of this rank's micro-batches, of equal size."""
    group = world_or_solo()
    local = size // group.size
    batch = batch_of(size)
    teacher = teacher_of(size, torch.float32)
    parts = []
    for start in range(group.rank * local, (group.rank + 1) * local, micro):
        rows = slice(start, start + micro)
        part = {key: value[rows] for key, value in batch.items()}
        part["teacher"] = (*(t[rows] for t in teacher), torch.tensor([20.0]))
        parts.append(part)
    return parts


def engine_of(config, row, stage: int, precision: str = "fp32", **optimizer) -> tuple:
    """An engine with the tiny model of one row of objectives, and its loss."""
    total = total_of(row[0])
    section = config.engine.model_copy(update={"zero_stage": stage, "precision": precision})
    changed = config.optimizer.model_copy(update=optimizer)
    config = config.model_copy(update={"engine": section, "optimizer": changed})
    engine = Engine(model_of(row[1], total), config, torch.device("cpu"))

    def compare(features):
        return total(features, similarity=engine.model.similarity, group=world_or_solo())

    return engine, compare


def gradients(config) -> list:
    """Gradients before the optimizer: every stage, the whole batch at once and in micro-batches."""
    found = []
    world_size = world_or_solo().size
    local = config.global_batch_size // world_size
    for stage in STAGES:
        rows = (ROWS[6], ROWS[9], ROWS[16]) if stage == 2 else (ROWS[6],)
        for micro in (local, local // 2) if world_size < 4 else (local // 2,):
            for row in rows:
                engine, compare = engine_of(config, row, stage)
                backward(engine, cut(config.global_batch_size, micro), compare)
                own = {n: g.clone() for n, g in engine.gradients().items()}
                norm = engine.step(0.0).gradient_norm
                found.append((f"{row[0]} {row[1]}", stage, local // micro, own, norm))
    return found


if __name__ == "__main__":
    config = load_config(sys.argv[1], PretrainConfig)
    start_processes(1)
    for check in sys.argv[3:]:
        found = globals()[check](config)
        if dist.get_rank() == 0:
            torch.save(found, Path(sys.argv[2]) / f"{check}-{dist.get_world_size()}.pt")
