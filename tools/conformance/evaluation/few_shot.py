"""Goldens of the few-shot methods without training, the linear probe and the sampler."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.methods import amu
from evaluation.methods import gda as gda_method
from evaluation.methods import linear_probe as probe
from evaluation.methods import tip_adapter as tip
from evaluation.methods.clip_adapter import adapter_logits
from evaluation.methods.few_shot import Labelled, accuracy, correct, one_hot
from evaluation.methods.sampler import IntArray, base_and_new, sample
from pretrain.model.geometries import Cosine
from tools.conformance.evaluation.golden import (
    EXACT,
    LOOSE_RTOL,
    SCALE,
    SCORE_RTOL,
    Golden,
    task_of,
)
from tools.conformance.table import Row, compare, equal

_PERCENT = 100.0


def gda(golden: Golden) -> Iterator[Row]:
    """Means, precision, head, every alpha's validation accuracy, and the test."""
    task, validation, test = task_of(golden.inputs())
    mean_CD, precision_DD, weight_DC, bias_C = gda_method.fit_gaussians(
        task.train.image_nD, task.train.label_n, task.num_classes
    )
    parts = {"mus": mean_CD, "cov_inv": precision_DD, "W": weight_DC, "b": bias_C}
    for key, ours in parts.items():
        yield compare(golden.name, key, ours, golden[key], atol=_span(golden[key]), rtol=LOOSE_RTOL)
    gaussian = validation.image_nD.double() @ weight_DC + bias_C
    alpha, found = gda_method.choose_alpha(validation.logit_nC, gaussian, validation.label_n)
    yield compare(golden.name, "val_acc", _PERCENT * found, golden["val_acc"], atol=1e-4)
    yield compare(golden.name, "best_alpha", alpha, golden["best_alpha"], atol=1e-12)
    every = [validation.logit_nC + a * gaussian for a in gda_method.ALPHAS]
    expected = golden["val_logits"]
    stacked = np.stack([logits.numpy() for logits in every])
    yield compare(golden.name, "val_logits", stacked, expected, atol=1e-3, rtol=LOOSE_RTOL)
    fitted = gda_method.Gda().fit(task, validation)
    logits = fitted.logits(test)
    yield compare(
        golden.name, "test_logits", logits, golden["test_logits"], atol=1e-3, rtol=LOOSE_RTOL
    )
    ours_acc = _PERCENT * accuracy(logits, test)
    yield compare(golden.name, "test_acc", ours_acc, golden["test_acc"], atol=1e-4)


def _span(expected: object) -> float:
    """Return what rtol leaves for entries near zero: 1e-5 of the largest entry."""
    return 1e-5 * float(np.max(np.abs(np.asarray(expected)), initial=0.0)) + 1e-6


def gda_base_to_new(golden: Golden) -> Iterator[Row]:
    """Base classes with samples, new classes from their texts' neighbours."""
    inputs = golden.inputs("d512_s16")
    task, validation, test = task_of(inputs)
    base, new = ([int(label) for label in part] for part in base_and_new(inputs["train_y"]))
    base_fitted, new_fitted = gda_method.base_to_new(task, validation, base)
    mean_CD, weight_DC, bias_C = gda_method.new_discriminant(
        gda_method.only_classes(task.train, base).image_nD,
        task.class_CD[torch.tensor(new)],
        task.similarity,
        k=int(golden.number("k", gda_method.NUM_NEIGHBOURS)),
    )
    yield compare(golden.name, "alpha", base_fitted.chosen["alpha"], golden["alpha"], atol=1e-12)
    for key, ours in (("mu_new", mean_CD), ("W_new", weight_DC), ("b_new", bias_C)):
        yield compare(golden.name, key, ours, golden[key], atol=_span(golden[key]), rtol=LOOSE_RTOL)
    for kind, labels, fitted in (("base", base, base_fitted), ("new", new, new_fitted)):
        part = gda_method.only_classes(test, labels)
        logits, expected = fitted.logits(part), golden[f"{kind}_test_logits"]
        yield compare(
            golden.name,
            f"{kind}_test_logits",
            logits,
            expected,
            atol=_span(expected),
            rtol=LOOSE_RTOL,
        )
        ours_acc = _PERCENT * accuracy(logits, part)
        yield compare(golden.name, f"{kind}_acc", ours_acc, golden[f"{kind}_acc"], atol=1e-4)


def tip_adapter(golden: Golden) -> Iterator[Row]:
    """Logits at the start, the searched (beta, alpha), and the test."""
    task, validation, test = task_of(golden.inputs())
    best_N = tip.self_scores(task.train.image_nD, task.similarity)
    label_NC = one_hot(task.train.label_n, task.num_classes)

    def short(part: Labelled) -> Tensor:
        return tip.shortfall(part.image_nD, task.train.image_nD, task.similarity, best_N)

    beta, alpha = golden.number("init_beta"), golden.number("init_alpha")
    start = validation.logit_nC + alpha * tip.cache_logits(short(validation), label_NC, beta)
    yield compare(
        golden.name, "val_logits_init", start, golden["val_logits_init"], atol=1e-4, rtol=SCORE_RTOL
    )
    beta_max, alpha_max = (float(bound) for bound in golden["search_scale"])
    num_betas, num_alphas = (int(step) for step in golden["search_step"])
    beta, alpha = tip.search(
        validation.logit_nC,
        short(validation),
        label_NC,
        validation.label_n,
        scale=(beta_max, alpha_max),
        steps=(num_betas, num_alphas),
    )
    yield compare(golden.name, "best_beta", beta, golden["best_beta"], atol=1e-9)
    yield compare(golden.name, "best_alpha", alpha, golden["best_alpha"], atol=1e-9)
    best = test.logit_nC + alpha * tip.cache_logits(short(test), label_NC, beta)
    yield compare(
        golden.name,
        "test_logits_best",
        best,
        golden["test_logits_best"],
        atol=1e-4,
        rtol=SCORE_RTOL,
    )
    accuracies = {
        "val_acc_zs": accuracy(validation.logit_nC, validation),
        "val_acc_init": accuracy(start, validation),
        "test_acc_zs": accuracy(test.logit_nC, test),
        "test_acc_best": accuracy(best, test),
    }
    for key, ours in accuracies.items():
        yield compare(golden.name, key, _PERCENT * ours, golden[key], atol=1e-4)


def clip_adapter(golden: Golden) -> Iterator[Row]:
    """The adapter's logits."""
    cosine = Cosine()
    ours = adapter_logits(
        golden.tensor("image_features"),
        cosine.embed(golden.tensor("text_features")),
        golden.tensor("w1"),
        golden.tensor("w2"),
        ratio=golden.number("ratio"),
        scale=golden.number("logit_scale", SCALE),
        similarity=cosine,
    )
    yield compare(golden.name, "logits", ours, golden["logits"], atol=1e-4, rtol=SCORE_RTOL)


def amu_uncertainty(golden: Golden) -> Iterator[Row]:
    """Every uncertainty at every number of classes and power in the file, and the normalizing."""
    for key in sorted(golden.arrays):
        found = re.fullmatch(r"(.+)_C(\d+)_p([\d.]+)", key)
        if found:
            kind, classes, power = found.groups()
            logits = golden.tensor(f"logits_C{classes}").double()
            ours = amu.uncertainty(logits, kind, float(power), amu.PUBLISHED_KAPPA)  # type: ignore[arg-type]
        elif key.startswith("logit_normalize_C"):
            ours = amu.standardized(golden.tensor(key.replace("logit_normalize", "logits")))
        else:
            continue
        yield compare(golden.name, key, ours, golden[key], atol=1e-5, rtol=SCORE_RTOL)


def amu_forward(golden: Golden) -> Iterator[Row]:
    """Head, branches, fusion, losses and accuracy with every uncertainty."""
    task, _, test = task_of(golden.inputs())
    head_CA = amu.initial_head(amu.aux_of(task.train), task.train.label_n, task.num_classes)
    yield compare(
        golden.name, "init_weight", head_CA, golden["init_weight"], atol=1e-6, rtol=SCORE_RTOL
    )
    clip = golden["clip_logits"]
    yield compare(golden.name, "clip_logits", test.logit_nC, clip, atol=1e-4, rtol=SCORE_RTOL)
    kinds = [key.removesuffix("_factor") for key in golden.arrays if key.endswith("_factor")]
    for kind in kinds:
        fusion = amu.Fusion(
            golden.number("alpha"),
            golden.number("lambda_merge"),
            kind,  # type: ignore[arg-type]
            golden.number("power"),
            amu.PUBLISHED_KAPPA,
        )
        fused, aux = amu.branches(test.logit_nC, amu.aux_of(test), head_CA, fusion)
        total, merge, aux_loss = amu.losses(fused, aux, test.label_n, fusion.weight)
        factor = amu.uncertainty(test.logit_nC, fusion.uncertainty, fusion.power, fusion.kappa)
        expected = np.broadcast_to(golden[f"{kind}_factor"], factor.shape)
        ours = {"logits": fused, "loss": total, "loss_merge": merge, "loss_aux": aux_loss}
        yield compare(golden.name, f"{kind}_factor", factor, expected, atol=1e-5, rtol=SCORE_RTOL)
        for what, value in ours.items():
            key = f"{kind}_{what}"
            yield compare(golden.name, key, value, golden[key], atol=1e-4, rtol=SCORE_RTOL)
        acc = _PERCENT * correct(fused, test.label_n)
        yield compare(golden.name, f"{kind}_acc", acc, golden[f"{kind}_acc"], atol=1e-4)
    yield compare(golden.name, "aux_logits", aux, golden["aux_logits"], atol=1e-4, rtol=SCORE_RTOL)


def linear_probe(golden: Golden) -> Iterator[Row]:
    """Accuracy at every C, and the coefficients at C = 0.316."""
    inputs = golden.inputs()
    train_x, train_y = inputs["train_x"], inputs["train_y"]
    val_acc, test_acc = [], []
    for c in golden["C"]:
        model = probe.fit(train_x, train_y, float(c))
        val_acc.append(model.score(inputs["val_x"], inputs["val_y"]))
        test_acc.append(model.score(inputs["test_x"], inputs["test_y"]))
    yield compare(golden.name, "val_acc", val_acc, golden["val_acc"], atol=EXACT)
    yield compare(golden.name, "test_acc", test_acc, golden["test_acc"], atol=EXACT)
    model = probe.fit(train_x, train_y, 0.316)
    for key, ours in (("coef", model.coef_), ("intercept", model.intercept_)):
        expected = golden[f"{key}_C0316"]
        yield compare(golden.name, f"{key}_C0316", ours, expected, atol=1e-4, rtol=SCORE_RTOL)
    ours = model.score(inputs["test_x"], inputs["test_y"])
    yield compare(golden.name, "test_acc_C0316", ours, golden["test_acc_C0316"], atol=EXACT)


def sampler(golden: Golden) -> Iterator[Row]:
    """The very samples that the published sampler takes, for every seed and number of shots."""
    names, labels = _items(golden)
    for key in sorted(golden.arrays):
        found = re.fullmatch(r"seed(\d+)_(?:shots(\d+)|train(\d+)_then_val(\d+)_val)", key)
        if not found:
            continue
        seed, shots, first, then = found.groups()
        generator = random.Random(int(seed))
        if first is not None:
            sample(generator, labels, int(first))
        chosen = [names[i] for i in sample(generator, labels, int(shots or then))]
        yield _same(golden.name, key, chosen, golden[key].tolist())
    if "base_paths" in golden:
        groups = zip(("base", "new"), base_and_new(labels), strict=True)
        for kind, classes in groups:
            own = np.flatnonzero(np.isin(labels, classes))
            relabelled = np.searchsorted(classes, labels[own])
            ours = sorted((names[i], int(label)) for i, label in zip(own, relabelled, strict=True))
            theirs = zip(
                golden[f"{kind}_paths"].tolist(), golden[f"{kind}_labels"].tolist(), strict=True
            )
            yield _same(golden.name, f"{kind} split", ours, sorted(theirs))


def _items(golden: Golden) -> tuple[list[str], IntArray]:
    """Return the items' names and labels: item i is img%04d of class i mod C, as the file says."""
    num_items, num_classes = int(golden.number("n_items")), int(golden.number("n_classes"))
    return [f"img{i:04d}" for i in range(num_items)], np.arange(num_items) % num_classes


def _same(name: str, key: str, ours: list[Any], theirs: list[Any]) -> Row:
    wrong = sum(a != b for a, b in zip(ours, theirs, strict=False)) + abs(len(ours) - len(theirs))
    return equal(name, key, len(theirs), wrong)
