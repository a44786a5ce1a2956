"""Sums over rows in chunks: the local rows against the global batch in the memory of one chunk.

The logits of b local rows against B pairs of the global batch do not fit where B is large. Here
each chunk's loss and its gradient are computed together and the logits are let go; the backward
only scales what was kept. So nothing is computed twice, and the memory is O(chunk x B).

Legend: b local rows, c rows of a chunk, m candidates, B of the global batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.objectives.group import Group

# function(first row of the chunk, *chunks of the rows, *whole tensors) -> the sum over the chunk
RowsFunction = Callable[..., Tensor]


def mean_over_rows(
    function: RowsFunction,
    rows: Sequence[Tensor],
    whole: Sequence[Tensor],
    *,
    chunk_rows: int,
    parameters: Iterator[nn.Parameter] | Sequence[nn.Parameter] = (),
) -> Tensor:
    """Return the mean over the own rows of what `function` sums over the rows of a chunk.

    `rows` are cut along their first dimension, `whole` are given as they are; `parameters` are
    what `function` uses besides (a similarity's curvature). Not differentiable twice.
    """
    tensors = (*rows, *whole, *parameters)
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in tensors]
    layout = (len(rows), len(whole), chunk_rows, needs)
    total: Tensor = _ChunkedSum.apply(function, layout, *tensors)  # type: ignore[no-untyped-call]
    return total / len(rows[0])


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, function: RowsFunction, layout: Any, *tensors: Tensor) -> Tensor:
        num_rows, num_whole, chunk, needs = layout
        used = [tensor.detach() for tensor in tensors[: num_rows + num_whole]]
        for tensor, needed in zip(used, needs, strict=False):
            tensor.requires_grad_(needed)
        whole, parameters = used[num_rows:], tensors[num_rows + num_whole :]
        gradients = [
            torch.zeros_like(t) if n else None for t, n in zip(tensors, needs, strict=True)
        ]
        losses = []
        for start in range(0, len(tensors[0]), chunk):
            cut = [t[start : start + chunk].detach() for t in used[:num_rows]]
            for tensor, needed in zip(cut, needs, strict=False):
                tensor.requires_grad_(needed)
            inputs = (*cut, *whole, *parameters)
            with torch.set_grad_enabled(any(needs)):
                loss = function(start, *cut, *whole)
            losses.append(loss.detach())
            wanted = [i for i, needed in enumerate(needs) if needed]
            if not wanted:
                continue
            found = torch.autograd.grad(loss, [inputs[i] for i in wanted], allow_unused=True)
            for i, gradient in zip(wanted, found, strict=True):
                kept = gradients[i]
                if gradient is not None and kept is not None:
                    place = kept[start : start + chunk] if i < num_rows else kept
                    place += gradient
        context.save_for_backward(*gradients)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(context: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        kept = (g if g is None else g * outer[0].to(g.dtype) for g in context.saved_tensors)
        return (None, None, *kept)


def own_places(group: Group, num_rows: int, start: int, like_cD: Tensor) -> Tensor:
    """Return where the rows of a chunk stand in the global batch [c]."""
    first = group.rank * num_rows + start
    return torch.arange(first, first + len(like_cD), device=like_cD.device)


def softmax_loss(
    row_bD: Tensor,
    candidate_mD: Tensor,
    scale: Tensor,
    scores: Callable[[Tensor, Tensor], Tensor],
    group: Group,
    *,
    chunk_rows: int,
    parameters: Iterator[nn.Parameter] | Sequence[nn.Parameter] = (),
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the mean over the own rows of CE(scale * scores(rows, candidates)).

    The right candidate of a row stands at the row's own place in the global batch; candidates
    beyond those of the global batch are never right.
    """

    def summed(start: int, row_cD: Tensor, candidate_mD: Tensor, scale: Tensor) -> Tensor:
        return nn.functional.cross_entropy(
            scale * scores(row_cD, candidate_mD),
            own_places(group, len(row_bD), start, row_cD),
            reduction="sum",
            label_smoothing=label_smoothing,
        )

    return mean_over_rows(
        summed,
        [row_bD],
        [candidate_mD, scale.to(row_bD.dtype)],
        chunk_rows=chunk_rows,
        parameters=parameters,
    )


def dot(row_nD: Tensor, candidate_mD: Tensor) -> Tensor:
    """Return inner products [n, m]."""
    return row_nD @ candidate_mD.T


def unit(feature_nD: Tensor) -> Tensor:
    """Return rows of length 1, in float32 at least."""
    dtype = torch.promote_types(feature_nD.dtype, torch.float32)
    return nn.functional.normalize(feature_nD.to(dtype), dim=-1)
