"""The loss of a whole global batch from micro-batches: features are cached, gradients replayed.

A contrastive loss is no sum over micro-batches, so that adding up the gradients of their losses
would be another method with fewer negatives. Here (GradCache, arXiv:2101.06983):

1. every micro-batch is encoded, all but the last without a graph, and its features kept;
2. the loss is taken once over the features of all micro-batches of all ranks, and its gradient with
   respect to features, logit scale and bias, and the geometry's parameters;
3. each micro-batch is encoded again with a graph and that gradient is sent back into the towers.

The replay is the same computation: kept patches are part of the batch, and what layers draw (drop
path) is drawn from the same generator state. The gradient of what belongs to no row enters in one
backward pass alone, so it is counted once (open_clip counts it once a micro-batch). The last
micro-batch keeps its graph from step 1: k micro-batches cost 2k - 1 forward passes.

Only the last backward pass of a step averages over ranks (Engine.backward's `last`). A loss that is
not finite makes the gradients NaN: their average then tells every rank, without an extra message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.engine import Engine
from pretrain.model.features import Features
from pretrain.objectives.registry import Loss

Compare = Callable[[Features], Loss]
Inputs = Mapping[str, Any]  # keywords of ClipModel.forward


class Compared(NamedTuple):
    """The local features of a step, without graph, and the loss over them."""

    features: Features
    loss: Loss


def backward(engine: Engine, micro_batches: Sequence[Inputs], compare: Compare) -> Compared:
    """Leave the gradients of the global batch's loss in the engine, ready for its step.

    `compare` takes the features of all local rows. Every rank has equally many micro-batches.
    """
    if len(micro_batches) == 1:
        features = engine.forward(**micro_batches[0])
        loss = compare(features)
        engine.backward(_marked(loss.loss))
        return Compared(_detached(features), loss)
    return _replayed(engine, micro_batches, compare)


def _replayed(engine: Engine, micro_batches: Sequence[Inputs], compare: Compare) -> Compared:
    generators, encoded = [], []
    with torch.no_grad():
        for inputs in micro_batches[:-1]:
            generators.append(_generator_states(engine.device))
            encoded.append(engine.forward(**inputs))
    last = engine.forward(**micro_batches[-1])
    after = _generator_states(engine.device)
    leaves = _joined([*encoded, last])
    loss = compare(leaves)
    of_features, of_parameters = _gradients(engine, leaves, _marked(loss.loss))
    starts = [0]
    for features in [*encoded, last]:
        starts.append(starts[-1] + len(features.image_bD))

    def send_back(features: Features, number: int, *, boundary: bool) -> None:
        rows = slice(starts[number], starts[number + 1])
        parts = [
            _dot(tensor, gradient[rows] if tensor.ndim > 1 else gradient * boundary)
            for tensor, gradient in zip(_tensors(features), of_features, strict=True)
            if gradient is not None
        ]
        parts += [_dot(p, gradient * boundary) for p, gradient in of_parameters]
        engine.backward(torch.stack(parts).sum(), last=boundary)

    send_back(last, len(micro_batches) - 1, boundary=False)
    for number, (inputs, states) in enumerate(zip(micro_batches, generators, strict=False)):
        _restore(states, engine.device)
        send_back(engine.forward(**inputs), number, boundary=number == len(generators) - 1)
    _restore(after, engine.device)
    return Compared(_detached(leaves), loss)


def _marked(loss: Tensor) -> Tensor:
    finite = loss.detach().isfinite()
    return loss * torch.where(finite, torch.ones_like(loss), torch.full_like(loss, torch.nan))


def _dot(tensor: Tensor, gradient: Tensor) -> Tensor:
    return (tensor.to(gradient.dtype) * gradient).sum()


def _tensors(features: Features) -> list[Tensor]:
    return [value for value in features if isinstance(value, Tensor)]


def _detached(features: Features) -> Features:
    values: Any = (v.detach() if isinstance(v, Tensor) else v for v in features)
    return Features(*values)


def _joined(parts: Sequence[Features]) -> Features:
    """Return the rows of all micro-batches as leaves; what belongs to no row is the same in all.

    The last one's graph says which need a gradient (a teacher's do not). Features of half precision
    stay so: the loss raises them as it would without accumulation.
    """
    joined: list[Any] = []
    for values in zip(*parts, strict=True):
        if isinstance(values[0], Tensor):
            whole = torch.cat(values) if values[0].ndim > 1 else values[0]
            joined.append(whole.detach().clone().requires_grad_(values[-1].requires_grad))
        else:
            joined.append(values[0])
    return Features(*joined)


def _gradients(
    engine: Engine, leaves: Features, loss: Tensor
) -> tuple[list[Tensor | None], list[tuple[nn.Parameter, Tensor]]]:
    """Return d loss / d each tensor of the features, and / d the geometry's learned parameters."""
    tensors = _tensors(leaves)
    learned = [p for p in engine.model.similarity.parameters() if p.requires_grad]
    wanted = [tensor for tensor in (*tensors, *learned) if tensor.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    found = {id(t): g for t, g in zip(wanted, gradients, strict=True) if g is not None}
    of_learned = [(p, found[id(p)]) for p in learned if id(p) in found]
    return [found.get(id(tensor)) for tensor in tensors], of_learned


def _generator_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _restore(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
