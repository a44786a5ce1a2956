"""Every method on features of made clusters: what it gives, what it may see, hand-worked cases."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from arrays import SIZES, make_subject

from configs.errors import DataError
from configs.load import validate
from configs.registry import Config
from evaluation.config import MethodSection
from evaluation.dataset import Groups
from evaluation.methods import (
    amu,
    calibration,
    few_shot,
    gda,
    mano,
    ood_metrics,
    selection,
    tip_adapter,
    wise_ft,
)
from evaluation.methods.catalogue import learners, methods
from evaluation.methods.few_shot_sweep import rows_of
from evaluation.methods.sampler import sample, shots_and_validation
from evaluation.methods.selective import aurc, aurc_resampled
from evaluation.statistics import intervals
from pretrain.model.geometries import Cosine
from tools.conformance.__main__ import main as conformance

SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden" / "evaluation"
COPIED = Path(__file__).parent.parent / "golden" / "evaluation"
LEARNERS = [
    {"name": "tip_adapter"},
    {"name": "tip_adapter_f", "epochs": 4},
    {"name": "clip_adapter"},
    {"name": "gda"},
]
METHODS = [
    {"name": "zero_shot"},
    {"name": "zero_shot", "combine": "scores"},
    {"name": "clip_score"},
    {"name": "linear_probe", "search": "coop"},
    {"name": "linear_probe"},
    {"name": "few_shot", "learners": LEARNERS, "shots": [16], "seeds": 2},
    {"name": "base_to_new", "seeds": 2},
    {"name": "ood", "sets": ["other"]},
    {"name": "calibration"},
    {"name": "selective"},
    {"name": "mano"},
    {"name": "worst_group", "attribute": "tone", "with_label": True},
    {"name": "geometry"},
]


class One(Config):
    method: MethodSection


def run(section: dict, **keys):
    method = validate({"method": section}, One, label="test").method.build()
    subject = make_subject(**keys)
    assert method.lacks(subject.dataset) is None
    torch.manual_seed(0)
    return list(method.run(subject))


def values(outcomes) -> dict:
    return {(o.method, o.shots, m.name): m.value for o in outcomes for m in o.metrics}


@pytest.fixture(scope="module")
def outcomes():
    return {str(section): run(section) for section in METHODS}


def of(outcomes, name: str):
    return [o for section, found in outcomes.items() if f"'{name}'" in section for o in found]


def test_every_metric_has_a_definition_and_an_interval_around_its_value(outcomes):
    for found in outcomes.values():
        assert found
        for outcome in found:
            for metric, interval in zip(
                outcome.metrics, intervals(outcome.metrics, seed=0, num_bootstrap=200), strict=True
            ):
                assert metric.definition
                assert np.isfinite(metric.value), metric.name
                if interval is not None:
                    low, high = interval
                    assert low - 1e-9 <= metric.value <= high + 1e-9, metric.name


def test_methods_with_shots_are_above_zero_shot_which_is_above_chance(outcomes):
    start = values(of(outcomes, "zero_shot"))["zero_shot", None, "top1"]
    assert start > 2 / 6
    found = values(of(outcomes, "few_shot"))
    for name in ("tip_adapter", "tip_adapter_f", "clip_adapter", "gda"):
        assert found[name, 16, "top1"] > start, name
    assert values(of(outcomes, "linear_probe"))["linear_probe", None, "top1"] > start


def test_the_methods_here_are_all_that_labels_are_for():
    without_labels = {"retrieval", "selection", "association"}
    assert {section["name"] for section in METHODS} == set(methods) - without_labels
    # AMU-Tuning needs an auxiliary encoder, and has its own test below
    assert {section["name"] for section in LEARNERS} == set(learners) - {"amu_tuning"}


@pytest.mark.parametrize("section", METHODS, ids=str)
def test_shuffled_test_labels_change_no_choice(section, outcomes):
    labels = np.random.default_rng(1).permutation(np.arange(SIZES["test"]) % 6)
    shuffled = run(section, test_labels=labels)
    plain = outcomes[str(section)]
    assert [o.chosen for o in shuffled] == [o.chosen for o in plain]
    if section["name"] not in ("clip_score", "mano", "ood"):  # which look at no test label at all
        assert values(shuffled) != values(plain)


def test_amu_chooses_on_validation_and_the_published_protocol_on_test_and_says_so(tmp_path):
    draw = np.random.default_rng(0)
    center = draw.normal(size=(6, 10))
    for split, n in SIZES.items():
        features = center[np.arange(n) % 6] + draw.normal(size=(n, 10))
        np.save(tmp_path / f"{split}.npy", features)
    both = [
        {"name": "amu_tuning", "epochs": 3},
        {"name": "amu_tuning", "epochs": 3, "compat": "published"},
    ]
    section = {"name": "few_shot", "shots": [8], "seeds": 2, "learners": both}
    section["auxiliary"] = f"file:{tmp_path}"
    labels = np.random.default_rng(1).permutation(np.arange(SIZES["test"]) % 6)
    (plain, published), (shuffled, _) = run(section), run(section, test_labels=labels)
    assert plain.chosen == shuffled.chosen
    assert [plain.compat, published.compat] == ["none", "published"]
    assert "may look at test labels" in published.metrics[0].definition
    assert plain.metrics[0].value > values(run(METHODS[0]))["zero_shot", None, "top1"]


def test_amu_with_nothing_to_choose_by_keeps_the_alpha_that_it_was_given():
    part = few_shot.labelled(torch.eye(4), torch.arange(4), torch.eye(4), Cosine(), 20.0)
    part = replace(part, aux_nA=torch.eye(4))
    task = few_shot.FewShotTask(part, torch.eye(4), Cosine(), 20.0, seed=1)
    nothing = rows_of(part, np.zeros(0, dtype=np.int64))
    for alpha in (3.0, 0.5):
        learner = learners.section("amu_tuning")(name="amu_tuning", alpha=alpha, epochs=1).build()
        assert learner.fit(task, nothing).chosen["alpha"] == alpha


def test_a_probe_without_images_to_validate_by_says_so():
    subject = make_subject()
    sources = {name: subject.dataset.sources[name] for name in ("train", "test")}
    without_val = replace(subject, dataset=replace(subject.dataset, sources=sources))
    probe = methods.section("linear_probe")(name="linear_probe", validation=1e-9).build()
    with pytest.raises(DataError, match=r"0 of 240 train images held out .* 6 classes"):
        list(probe.run(without_val))


def test_the_slope_of_amu_in_closed_form_is_that_of_autograd():
    torch.manual_seed(0)
    logit_NC, aux_NA, label_N = 3 * torch.randn(9, 4), torch.rand(9, 7), torch.arange(9) % 4
    shots = few_shot.Labelled(aux_NA, aux_NA, label_N, logit_NC, aux_NA)
    index_b = torch.tensor([4, 1, 7])
    for fusion in (amu.Fusion(), amu.Fusion(alpha=2.0, weight=1.0, uncertainty="entropy")):
        head_CA = torch.randn(4, 7).requires_grad_()
        fused, aux = amu.branches(logit_NC[index_b], aux_NA[index_b], head_CA, fusion)
        expected = amu.losses(fused, aux, label_N[index_b], fusion.weight)
        expected[0].backward()
        found, slope = amu.Slope.of(shots, fusion).at(head_CA.detach(), index_b)
        assert found == pytest.approx([loss.item() for loss in expected], abs=1e-6)
        torch.testing.assert_close(slope, head_CA.grad)


def test_groups_are_weighed_by_their_names_whatever_their_number_in_train():
    subject = make_subject()
    train, test = subject.dataset.part("train"), subject.dataset.part("test")
    tone = Groups(("light", "zebra"), np.arange(len(train.samples)) % 2)
    subject.dataset.parts["train"] = replace(train, groups={"tone": tone})
    section = {"name": "worst_group", "attribute": "tone"}
    method = validate({"method": section}, One, label="test").method.build()
    (outcome,) = method.run(subject)
    found = {metric.name: metric.value for metric in outcome.metrics}
    accuracy = {name: value for name, value, _ in outcome.shown["groups"]}
    assert found["adjusted_average"] == pytest.approx(accuracy["light"])
    assert found["worst_group"] == pytest.approx(min(accuracy.values()))
    assert test.groups["tone"].names == tuple(accuracy)


def test_top5_of_four_classes_is_left_out_not_replaced():
    section = {"name": "worst_group", "attribute": "tone", "top": 5}
    method = validate({"method": section}, One, label="test").method.build()
    assert method.lacks(make_subject(num_classes=4).dataset) == "at least 5 classes, for top5"
    assert method.lacks(make_subject().dataset) is None


def test_classes_of_one_image_leave_base_to_new_finite():
    (outcome,) = run({"name": "base_to_new", "shots": 1, "seeds": 1})
    assert all(np.isfinite(metric.value) for metric in outcome.metrics)


def test_a_large_test_set_is_taken_in_blocks_and_gives_the_same(monkeypatch):
    section = {"name": "few_shot", "learners": LEARNERS[:2], "shots": [8], "seeds": 1}
    whole = values(run(section))
    widths = []

    def few(num_queries, num_candidates):
        widths.append(num_candidates)
        return [(i, min(i + 7, num_queries)) for i in range(0, num_queries, 7)]

    monkeypatch.setattr(tip_adapter, "blocks", few)
    assert values(run(section)) == whole
    assert set(widths) == {48, 6 * tip_adapter.ALPHA_STEPS}  # keys; classes x alphas


def test_the_goldens_that_are_copied_pass_and_what_is_not_built_is_listed(capsys):
    assert conformance(["evaluation", str(COPIED)]) == 0
    out = capsys.readouterr().out
    assert "0 fail" in out
    assert "TPT" in out


@pytest.mark.skipif(not SHARED.is_dir(), reason="no ../shared/golden/evaluation beside the tree")
def test_all_goldens_pass(capsys):
    assert conformance(["evaluation", str(SHARED)]) == 0
    assert " 0 fail, 6 not built, 10 not comparable" in capsys.readouterr().out


def test_the_sampler_takes_labels_as_they_appear_and_never_validates_on_a_shot():
    labels = np.asarray([3, 1, 3, 1, 3, 1, 2])
    chosen = sample(random.Random(1), labels, 2)
    assert labels[chosen].tolist() == [3, 3, 1, 1, 2]
    shots, held_out = shots_and_validation(labels, None, shots=1, validation=1, seed=4)
    assert not set(shots) & set(held_out)


def test_without_a_val_split_there_is_always_something_to_choose_by():
    labels = np.repeat([0, 1, 2], [12, 30, 1])
    shots, held_out = shots_and_validation(labels, None, shots=16, validation=4, seed=1)
    assert not set(shots) & set(held_out)
    assert np.bincount(labels[shots]).tolist() == [9, 16, 1]  # of 12, a quarter is held out
    assert np.bincount(labels[held_out], minlength=3).tolist() == [3, 4, 0]
    assert shots[:9].tolist() == sample(random.Random(1), labels, 16)[:9].tolist()


def test_one_view_of_one_shot_leaves_pure_zero_shot():
    features, labels = torch.eye(3, 5), torch.arange(3)
    _, precision, weight, _ = gda.fit_gaussians(features, labels, 3)
    assert not precision.any()
    assert not weight.any()


def test_mano_decides_by_all_batches_and_as_published_by_the_last_of_five():
    batches = [torch.full((2, 4), 1.0), torch.tensor([[9.0, 0, 0, 0]] * 2)]
    assert mano.delta_of(batches, published=True) == pytest.approx(mano.divergence(batches[1]))
    mean = (mano.divergence(batches[0]) + mano.divergence(batches[1])) / 2
    assert mano.delta_of(batches, published=False) == pytest.approx(mean)
    assert mano.agreement(np.array([1.0, 2, 3]), np.array([2.0, 4, 6])) == pytest.approx((1, 1))


def test_a_constant_selector_scores_chance():
    text, image, _ = selection.credits(torch.zeros(1, 2, 2))
    assert (float(text), float(image)) == (0.25, 0.25)
    assert selection.chance(2, 2) == (0.25, 0.25, pytest.approx(1 / 6))
    assert selection.chance(1, 2)[0] == 0.5


def test_a_perfect_temperature_leaves_nothing_to_calibrate():
    torch.manual_seed(0)
    logits = torch.randn(4000, 5) * 2
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert calibration.fit_temperature(logits, labels) == pytest.approx(1, abs=0.06)
    assert calibration.fit_temperature(3 * logits, labels) == pytest.approx(3, abs=0.2)


def test_areas_by_counts_are_those_of_repeated_samples():
    draw = np.random.default_rng(0)
    confidence, wrong = draw.random(30), draw.integers(0, 2, 30).astype(float)
    counts = np.ones((1, 30))
    assert aurc_resampled(confidence, wrong, counts)[0] == pytest.approx(aurc(confidence, wrong))
    pairs = [(a > b) + 0.5 * (a == b) for a in (1.0, 2, 2) for b in (0.0, 2)]
    standings = ood_metrics.Standings(np.array([1.0, 2, 2]), np.array([0.0, 2]))
    assert ood_metrics.auroc(standings.once())[0] == pytest.approx(np.mean(pairs))
    id_n, ood_m = draw.integers(0, 40, 50) + 10.0, draw.integers(0, 40, 30) + 0.0
    counts = draw.multinomial(30, np.ones(30) / 30, 4)
    counts = np.concatenate([draw.multinomial(50, np.ones(50) / 50, 4), counts], axis=1)
    drawn = ood_metrics.Standings(id_n, ood_m).counted(counts.astype(float))
    measures = (ood_metrics.auroc, ood_metrics.aupr_trapezoid, ood_metrics.average_precision)
    for measure in (*measures, *ood_metrics.FPR95.values()):
        for row, value in zip(counts, measure(drawn), strict=True):
            repeated = ood_metrics.Standings(id_n.repeat(row[:50]), ood_m.repeat(row[50:]))
            assert value == pytest.approx(measure(repeated.once())[0]), measure.__name__


def test_the_middle_of_two_models_is_their_mean_and_other_architectures_are_refused():
    zero, one = {"w": torch.zeros(2)}, {"w": torch.full((2,), 4.0)}
    assert wise_ft.interpolate(zero, one, 0.25)["w"].tolist() == [1, 1]
    with pytest.raises(Exception, match="two checkpoints of one architecture"):
        wise_ft.interpolate(zero, {"v": torch.zeros(2)}, 0.5)
