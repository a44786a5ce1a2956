"""Goldens of the few-shot methods that train: whole trajectories, in the rows' stored order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from evaluation.methods import amu
from evaluation.methods import tip_adapter as tip
from evaluation.methods.few_shot import accuracy, one_hot
from tools.conformance.evaluation.golden import LOSS_ATOL, Golden, task_of
from tools.conformance.table import Row, compare

_PERCENT = 100.0
_WEIGHT_ATOL = 1e-3
_LOGIT_ATOL, _LOGIT_RTOL = 1e-2, 2e-3


def tip_adapter_f(golden: Golden) -> Iterator[Row]:
    """Losses of every step, accuracy of every epoch, the best keys, the search and the test."""
    task, validation, test = task_of(golden.inputs())
    best_N = tip.self_scores(task.train.image_nD, task.similarity)
    key_ND, losses, accuracies = tip.learned_keys(
        task,
        beta=golden.number("beta"),
        alpha=golden.number("alpha"),
        epochs=int(golden.number("epochs")),
        batch_size=int(golden.number("batch_size")),
        learning_rate=golden.number("lr"),
        judge=test,
        seed=None,
    )
    yield compare(golden.name, "losses", losses, golden["losses"], atol=LOSS_ATOL)
    ours_acc = [_PERCENT * value for value in accuracies]
    yield compare(
        golden.name, "test_acc_per_epoch", ours_acc, golden["test_acc_per_epoch"], atol=1e-4
    )
    expected = golden["adapter_weight_best"]
    yield compare(golden.name, "adapter_weight_best", key_ND, expected, atol=_WEIGHT_ATOL)
    label_NC = one_hot(task.train.label_n, task.num_classes)
    short = tip.shortfall(validation.image_nD, key_ND, task.similarity, best_N)
    scale, steps = _grid(golden)
    beta, alpha = tip.search(
        validation.logit_nC, short, label_NC, validation.label_n, scale=scale, steps=steps
    )
    yield compare(golden.name, "best_beta", beta, golden["best_beta"], atol=1e-9)
    yield compare(golden.name, "best_alpha", alpha, golden["best_alpha"], atol=1e-9)
    short = tip.shortfall(test.image_nD, key_ND, task.similarity, best_N)
    logits = test.logit_nC + alpha * tip.cache_logits(short, label_NC, beta)
    expected = golden["test_logits_best"]
    yield compare(
        golden.name, "test_logits_best", logits, expected, atol=_LOGIT_ATOL, rtol=_LOGIT_RTOL
    )
    ours = _PERCENT * accuracy(logits, test)
    yield compare(golden.name, "test_acc", ours, golden["test_acc"], atol=1e-4)


def _grid(golden: Golden) -> tuple[tuple[float, float], tuple[int, int]]:
    """Return the search's bounds and steps: the file's, else its sibling's, else the dataset's."""
    sibling = golden.path.with_name(golden.path.name.replace("_F_golden", "_golden"))
    source = golden if "search_scale" in golden else None
    if source is None and sibling.is_file():
        source = Golden.read(sibling)
    if source is None:
        bounds = (13.0, 13.0) if "_dtd_" in golden.name else (7.0, 3.0)
        return bounds, (20, 10)
    scale, steps = source["search_scale"], source["search_step"]
    return (float(scale[0]), float(scale[1])), (int(steps[0]), int(steps[1]))


def amu_train(golden: Golden) -> Iterator[Row]:
    """Losses of every step, accuracy of every epoch, the final head and its logits."""
    task, _, test = task_of(golden.inputs())
    fusion = amu.Fusion(
        alpha=golden.number("alpha"),
        weight=golden.number("lambda_merge"),
        uncertainty=str(golden["uncent"]),  # type: ignore[arg-type]
        power=golden.number("power"),
        kappa=amu.PUBLISHED_KAPPA,
    )
    method = amu.AmuTuning(
        fusion,
        epochs=int(golden.number("epochs")),
        batch_size=int(golden.number("batch_size")),
        learning_rate=golden.number("lr"),
    )
    heads, steps = method.learned_heads(task, seed=None)
    yield compare(golden.name, "losses", np.asarray(steps), golden["losses"], atol=LOSS_ATOL)
    fused = [amu.branches(test.logit_nC, amu.aux_of(test), head, fusion)[0] for head in heads[1:]]
    ours = [_PERCENT * accuracy(logits, test) for logits in fused]
    yield compare(golden.name, "test_acc", ours, golden["test_acc"], atol=1e-4)
    yield compare(golden.name, "final_weight", heads[-1], golden["final_weight"], atol=_WEIGHT_ATOL)
    expected = golden["test_logits"]
    yield compare(
        golden.name, "test_logits", fused[-1], expected, atol=_LOGIT_ATOL, rtol=_LOGIT_RTOL
    )
