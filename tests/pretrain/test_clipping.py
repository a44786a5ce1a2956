"""Thresholds of the gradient norm: the released codes' numbers, their state, by hand."""

import json
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from configs.load import validate
from pretrain.clipping import clippings
from pretrain.config import OptimizerConfig, StabilityConfig
from pretrain.stability import Stability
from tools.conformance.gradclip import check_gradclip

GOLDEN = Path(__file__).resolve().parents[1] / "golden/objectives/gradclip.npz"
norms = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=60)


def sections():
    return [clippings.section(name)(name=name) for name in clippings]


def test_zclip_and_autoclip_are_the_released_codes_to_rounding():
    found = list(check_gradclip(GOLDEN))
    assert {row.verdict for row in found} == {"pass"}, [r for r in found if r.verdict != "pass"]
    cases = {row.case.split()[1] for row in found}
    assert cases == {"zclip/default", "zclip/mean", "zclip/percentile", "autoclip/p10"}
    assert max(row.error for row in found) <= 1e-12


def test_zclip_by_hand():
    clipping = clippings["zclip"](warmup_steps=2, alpha=0.5, z_threshold=2.0, eps=0.0)
    assert [clipping.threshold(norm) for norm in (1.0, 3.0)] == [None, None]
    assert (clipping.mean, clipping.variance) == (2.0, 1.0)
    # z = (6 - 2) / 1 = 4 > 2: clip to 2 + 2 * 1 * 2 / 4 = 3; mean (2 + 3) / 2, variance with it.
    assert clipping.threshold(6.0) == 3.0
    assert (clipping.mean, clipping.variance) == (2.5, 0.5 * 1.0 + 0.5 * 0.5**2)


def test_autoclips_window_forgets():
    clipping = clippings["autoclip"](percentile=50.0, window=3)
    assert [clipping.threshold(n) for n in (1.0, 2.0, 3.0, 100.0, 200.0)] == [1, 1.5, 2, 3, 100]


@given(norms, norms)
def test_a_state_that_went_through_json_goes_on_as_if_it_had_not(before, later):
    for section in sections():
        one, two = section.build(), section.build()
        for norm in before:
            one.threshold(norm)
        state = one.state_dict()
        two.load_state_dict(json.loads(json.dumps(state)))
        written = json.dumps(state)
        assert [one.threshold(n) for n in later] == [two.threshold(n) for n in later]
        assert json.dumps(state) == written  # a checkpoint is written while steps go on


@given(norms)
def test_a_threshold_never_exceeds_zclips_max_norm_and_is_positive(sequence):
    clipping = clippings["zclip"](max_norm=1.0, warmup_steps=5)
    thresholds = [clipping.threshold(norm) for norm in sequence]
    assert all(0 < threshold <= 1.0 for threshold in thresholds)


def test_clipping_is_by_norm_1_unless_the_configuration_says_otherwise():
    assert OptimizerConfig().clipping.build().threshold(5.0) == 1.0
    tree = {"clipping": {"name": "none"}}
    assert validate(tree, OptimizerConfig, label="t").clipping.build().threshold(5.0) is None


def test_steps_that_are_not_finite_are_counted_in_a_row_and_spikes_stand_out():
    stability = Stability(StabilityConfig(max_skipped_steps=2))
    losses = np.random.default_rng(0).normal(2.0, 0.1, 200)
    marked = [stability.note(loss, skipped=False, clipped=False) for loss in losses]
    assert not any(marked)
    assert stability.note(4.0, skipped=False, clipped=True)  # 20 deviations
    assert stability.note(float("nan"), skipped=True, clipped=False)
    assert not stability.must_go_back(at_end=False)
    assert stability.must_go_back(at_end=True)
    assert not stability.note(2.0, skipped=False, clipped=False)
    for _ in range(2):
        stability.note(float("inf"), skipped=True, clipped=False)
    assert stability.must_go_back(at_end=False)
    assert stability.go_back(100, 116) == (100, 116)
    assert (stability.position(99), stability.position(100)) == (99, 116)
    assert stability.go_back(100, 132) == (116, 148)  # past both
    assert not stability.must_go_back(at_end=True)
    assert (stability.skipped_steps, stability.clipped_steps) == (3, 1)
    copy = Stability(StabilityConfig(max_skipped_steps=2))
    copy.load_state_dict(json.loads(json.dumps(stability.state_dict())))
    assert vars(copy) | {"_section": 0} == vars(stability) | {"_section": 0}
