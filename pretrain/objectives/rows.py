"""Sums over rows in chunks: the local rows against the global batch in the memory of one chunk.

The logits of b local rows against B pairs of the global batch do not fit where B is large. Here
each chunk's loss and its gradient are computed together and the logits are let go; the backward
only scales what was kept. So nothing is computed twice, and the memory is O(chunk x B).

`mean_over_rows` takes any function and differentiates it. `mean_over_logits` takes a function that
gives the loss of logits and its slope in closed form, in place: then a chunk costs three matrix
products, two buffers of chunk x B and no other, whatever the loss.

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
# function(first row of the chunk, logits [c, m]) -> the sum over the chunk, and its slope by the
# logits in their own memory
LogitsFunction = Callable[[int, Tensor], Tensor]
# step(first row, inputs, places of the wanted ones) -> the sum over the chunk, and its gradients
Step = Callable[[int, Sequence[Tensor], Sequence[int]], tuple[Tensor, Sequence[Tensor | None]]]


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

    def step(
        start: int, inputs: Sequence[Tensor], wanted: Sequence[int]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        with torch.set_grad_enabled(bool(wanted)):
            loss = function(start, *inputs[: len(rows) + len(whole)])
        if not wanted:
            return loss, ()
        return loss, torch.autograd.grad(loss, [inputs[i] for i in wanted], allow_unused=True)

    return _mean(step, len(rows), (*rows, *whole), tuple(parameters), chunk_rows)


def mean_over_logits(
    function: LogitsFunction,
    row_bD: Tensor,
    candidate_mD: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    scores: Callable[[Tensor, Tensor], Tensor],
    chunk_rows: int,
    parameters: Iterator[nn.Parameter] | Sequence[nn.Parameter] = (),
) -> Tensor:
    """Return the mean over the own rows of a loss of scale * scores(rows, candidates) + bias.

    `function` gives the sum over a chunk and turns its logits into its slope by them, in place.
    Not differentiable twice.
    """
    scalars = [scale.to(row_bD.dtype)] + ([] if bias is None else [bias.to(row_bD.dtype)])

    def step(
        start: int, inputs: Sequence[Tensor], wanted: Sequence[int]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        row_cD, candidate, scale, *rest = inputs
        beside = [i for i in wanted if i == 2 or (i == 3 and bias is not None)]  # of scale and bias
        others = [i for i in wanted if i not in beside]
        with torch.set_grad_enabled(bool(others)):
            score_cm = scores(row_cD, candidate)
        slope_cm = score_cm.detach() * scale.detach()
        if bias is not None:
            slope_cm += rest[0].detach()
        loss = function(start, slope_cm)  # from here on the slope
        found: dict[int, Tensor | None] = {}
        if 2 in beside:
            found[2] = torch.linalg.vecdot(slope_cm, score_cm.detach()).sum().reshape(scale.shape)
        if 3 in beside:
            found[3] = slope_cm.sum().reshape(rest[0].shape)
        if others:
            given = [inputs[i] for i in others]
            slope_cm *= scale.detach()
            found |= zip(
                others,
                torch.autograd.grad(score_cm, given, slope_cm, allow_unused=True),
                strict=True,
            )
        return loss, [found[i] for i in wanted]

    tensors = (row_bD, candidate_mD, *scalars)
    return _mean(step, 1, tensors, tuple(parameters), chunk_rows)


def _mean(
    step: Step,
    num_rows: int,
    tensors: tuple[Tensor, ...],
    parameters: tuple[nn.Parameter, ...],
    chunk_rows: int,
) -> Tensor:
    given = (*tensors, *parameters)
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in given]
    layout = (num_rows, len(tensors), chunk_rows, needs)
    total: Tensor = _ChunkedSum.apply(step, layout, *given)  # type: ignore[no-untyped-call]
    return total / len(tensors[0])


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, step: Step, layout: Any, *tensors: Tensor) -> Tensor:
        num_rows, num_given, chunk, needs = layout
        # Parameters stay themselves: the function reaches them through the similarity.
        used = [tensor.detach() for tensor in tensors[:num_given]]
        for tensor, needed in zip(used, needs, strict=False):
            tensor.requires_grad_(needed)
        rest = (*used[num_rows:], *tensors[num_given:])
        wanted = [i for i, needed in enumerate(needs) if needed]
        gradients = [
            torch.zeros_like(t) if n else None for t, n in zip(tensors, needs, strict=True)
        ]
        losses = []
        for start in range(0, len(tensors[0]), chunk):
            cut = [t[start : start + chunk].detach() for t in used[:num_rows]]
            for tensor, needed in zip(cut, needs, strict=False):
                tensor.requires_grad_(needed)
            loss, found = step(start, (*cut, *rest), wanted)
            losses.append(loss.detach())
            for i, gradient in zip(wanted, found, strict=bool(found)):
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

    def summed(start: int, logits_cm: Tensor) -> Tensor:
        own_c = own_places(group, len(row_bD), start, logits_cm)
        return cross_entropy_(logits_cm, own_c, label_smoothing)

    return mean_over_logits(
        summed,
        row_bD,
        candidate_mD,
        scale,
        scores=scores,
        chunk_rows=chunk_rows,
        parameters=parameters,
    )


def cross_entropy_(logits_cm: Tensor, own_c: Tensor, smoothing: float) -> Tensor:
    """Return the sum over rows of CE; the logits become its slope, softmax less the label.

    The label is 1 - smoothing at the own place, and smoothing / m more everywhere.
    """
    place_c1 = own_c[:, None]
    logits_cm -= logits_cm.amax(dim=1, keepdim=True)
    right_c1 = logits_cm.gather(1, place_c1)
    label_c1 = (1 - smoothing) * right_c1
    if smoothing:
        label_c1 = label_c1 + smoothing * logits_cm.mean(dim=1, keepdim=True)
    total_c1 = logits_cm.exp_().sum(dim=1, keepdim=True)
    logits_cm /= total_c1
    logits_cm.scatter_add_(1, place_c1, torch.full_like(right_c1, smoothing - 1))
    if smoothing:
        logits_cm -= smoothing / logits_cm.shape[1]
    return (total_c1.log() - label_c1).sum()


def dot(row_nD: Tensor, candidate_mD: Tensor) -> Tensor:
    """Return inner products [n, m]."""
    return row_nD @ candidate_mD.T


def unit(feature_nD: Tensor) -> Tensor:
    """Return rows of length 1, in float32 at least."""
    dtype = torch.promote_types(feature_nD.dtype, torch.float32)
    return nn.functional.normalize(feature_nD.to(dtype), dim=-1)
