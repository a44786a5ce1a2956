"""CONFIG FILE: save the gradients of the first batch as DeepSpeed has them before the optimizer."""

import sys

import torch

from configs.load import load_config
from pretrain.build import build_parts
from pretrain.config import PretrainConfig

if __name__ == "__main__":
    parts = build_parts(load_config(sys.argv[1], PretrainConfig))
    batch = parts.dataset.batch(0)
    features = parts.engine.forward(batch.image_b3HW, batch.token_bL, batch.kept_bK)
    loss = parts.objective(features, similarity=parts.engine.model.similarity, group=parts.group)
    parts.engine.backward(loss.loss)
    gradients = parts.engine.gradients()
    if parts.group.rank == 0:
        torch.save(gradients, sys.argv[2])
