"""CONFIG FILE: save every objective's gradients through DeepSpeed in fp32, before the optimizer."""

import sys

import torch
import torch.distributed as dist

from configs.load import load_config
from pretrain.config import PretrainConfig
from pretrain.engine import Engine, start_processes
from pretrain.objectives.group import world_or_solo
from tests.pretrain.objective_rows import ROWS, inputs_of, model_of, total_of

if __name__ == "__main__":
    config = load_config(sys.argv[1], PretrainConfig)
    device = start_processes(1)
    group, size = world_or_solo(), config.global_batch_size
    rows = slice(group.rank * size // group.size, (group.rank + 1) * size // group.size)
    found = []
    for objective, similarity in ROWS:
        total = total_of(objective)
        engine = Engine(model_of(similarity, total), config, device)
        features = engine.forward(**inputs_of(size, total, rows))
        loss = total(features, similarity=engine.model.similarity, group=group).loss
        engine.backward(loss)
        found.append({n: g for n, g in engine.gradients().items() if g is not None})
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[2])
