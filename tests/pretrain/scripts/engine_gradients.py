"""FILE CONFIG...: save the gradients of each config's first batch, before the optimizer."""

import sys

import torch

from configs.load import load_config
from pretrain.build import build_parts
from pretrain.config import PretrainConfig
from pretrain.engine import start_processes
from pretrain.stages import Stages

if __name__ == "__main__":
    found = []
    for name in sys.argv[2:]:
        config = load_config(name, PretrainConfig)
        parts = build_parts(config, Stages.of(config).at(0), start_processes(1))
        batch = parts.dataset.batch(0)
        features = parts.engine.forward(batch.image_b3HW, batch.token_bL, batch.kept_bK)
        similarity = parts.engine.model.similarity
        loss = parts.objective(features, similarity=similarity, group=parts.group)
        parts.engine.backward(loss.loss)
        found.append(parts.engine.gradients())
    if parts.group.rank == 0:
        torch.save(found, sys.argv[1])
