"""Evaluate a model while it trains.

pretrain does not know the evaluation suite: `tools` hands the trainer a function of a `ModelView`
that every rank calls at the same samples, and whose numbers go into the log.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.engine import Engine
from pretrain.model.similarity import similarity_of
from pretrain.model.tokenizer import Tokenizer
from pretrain.model.view import ModelView
from pretrain.objectives.group import Group

Evaluate = Callable[[ModelView], dict[str, float]]


def evaluate_model(
    evaluate: Evaluate, engine: Engine, tokenizer: Tokenizer, group: Group, samples_seen: int
) -> dict[str, float]:
    """Call `evaluate` on the model of an engine; every rank must call it, and gets the same."""
    model = engine.model

    def encode(image_b3HW: Tensor, token_bL: Tensor) -> tuple[Tensor, Tensor]:
        device = engine.device
        features = engine.forward(image_b3HW.to(device), token_bL.to(device))
        return features.image_bD.float(), features.text_bD.float()

    learned = {
        name.removeprefix("similarity."): parameter.detach()
        for name, parameter in model.named_parameters()
        if name.startswith("similarity.")
    }
    similarity = similarity_of({"pairmill": {"similarity": model.similarity.section(learned)}})
    view = ModelView(encode, model.image_size, tokenizer, similarity, group, samples_seen)
    model.eval()
    try:
        with torch.no_grad():
            return evaluate(view)
    finally:
        model.train()
