"""Learning rates by hand, and stages on the clock of samples."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import ConfigError
from configs.load import to_yaml, validate
from pretrain.config import PretrainConfig
from pretrain.schedule import learning_rate, schedules
from pretrain.stages import Stages


def rates(name: str, **keys: float) -> list[float]:
    """Batches of 10: a warmup of 4 steps to a peak of 2, then 10 steps, then beyond the end."""
    schedule = schedules.section(name)(name=name, **keys).build()
    return [
        learning_rate(schedule, seen, peak=2.0, batch=10, warmup=40, total=140)
        for seen in range(0, 160, 10)
    ]


def test_every_schedule_starts_with_the_same_linear_warmup():
    for name, keys in [("cosine", {}), ("constant", {}), ("rsqrt", {"timescale_samples": 30})]:
        assert rates(name, **keys)[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_the_cosine_is_half_down_half_way_and_ends_at_its_floor():
    whole, floored = rates("cosine"), rates("cosine", final_fraction=0.1)
    assert whole[9] == pytest.approx(1.0)
    assert whole[6] == pytest.approx(2 * 0.5 * (1 + math.cos(math.pi / 5)))
    assert whole[14] == whole[15] == pytest.approx(0.0)
    assert whole[4:] == sorted(whole[4:], reverse=True)
    assert floored[9] == pytest.approx(1.1)  # 0.2 + (2 - 0.2) / 2
    assert floored[14] == pytest.approx(0.2)


def test_the_cosine_starts_again_at_the_peak_in_each_cycle():
    found = rates("cosine_restarts", cycles=2)
    assert found[4] == found[9] == 2.0  # two cycles of 50 samples
    assert found[5] == found[10] == pytest.approx(1 + math.cos(math.pi / 5))
    assert found[14] == found[15] == 0.0


def test_a_constant_rate_cools_down_over_the_last_samples_alone():
    straight = rates("constant", cooldown_samples=40)
    assert straight[4:15] == pytest.approx([2, 2, 2, 2, 2, 2, 2, 1.5, 1.0, 0.5, 0])
    curved = rates("constant", cooldown_samples=40, power=2.0, final_fraction=0.2)
    assert curved[11:15] == pytest.approx([0.4 + 1.6 * x**2 for x in (0.75, 0.5, 0.25, 0)])
    assert rates("constant")[4:14] == [2.0] * 10


def test_the_reciprocal_root_halves_after_three_timescales():
    found = rates("rsqrt", timescale_samples=30)
    assert found[13] == pytest.approx(2 / math.sqrt(1 + 90 / 30))  # 1.0
    cooled = rates("rsqrt", timescale_samples=30, cooldown_samples=20)
    assert cooled[:13] == found[:13]
    assert cooled[13:15] == pytest.approx([found[13] / 2, 0.0])


TREE = {
    "name": "staged", "output": "runs/staged", "data": {"manifest": "data"}, "model": "ViT-B-16",
    "objective": {"name": "clip"}, "global_batch_size": 10, "reduction": {"mask_ratio": 0.5},
    "optimizer": {"learning_rate": 2.0, "warmup_samples": 40},
    "stages": [
        {"name": "small", "samples": 145, "image_size": 112, "context_length": 16},
        {"name": "large", "samples": 59, "global_batch_size": 20, "reduction": {"mask_ratio": 0.25},
         "optimizer": {"learning_rate": 0.5, "schedule": {"name": "constant"}}},
        {"name": "tune", "samples": 10, "objective": {"name": "siglip"}},
    ],
}  # fmt: skip


def test_stages_follow_each_other_on_one_clock_and_round_down_to_whole_batches():
    config = validate(TREE, PretrainConfig, label="test")
    small, large, tune = Stages.of(config).stages
    assert (config.samples, config.num_steps) == (145 + 59 + 10, 14 + 2 + 1)
    assert (small.first_step, small.last_step, small.last_sample) == (0, 14, 140)
    assert (large.first_step, large.last_step, large.last_sample) == (14, 16, 180)
    assert (tune.first_sample, tune.last_sample) == (180, 190)
    assert [large.samples_at(step) for step in (14, 15, 16)] == [140, 160, 180]
    assert small.learning_rate(30) == small.learning_rate(40) == 2.0
    assert large.learning_rate(140) == 0.5 * 20 / 40  # a warmup and a schedule of its own
    stages = Stages.of(config)
    assert [stages.at(step).name for step in (0, 14, 15, 16, 17)] == [
        "small", "small", "large", "large", "tune"]  # fmt: skip
    assert stages.after(tune) is None


def test_a_stage_changes_what_it_names_and_leaves_the_rest():
    config = validate(TREE, PretrainConfig, label="test")
    small, large, tune = (stage.config for stage in Stages.of(config).stages)
    assert (small.image_size, large.image_size) == (112, None)
    assert (large.reduction.mask_ratio, tune.reduction.mask_ratio) == (0.25, 0.5)
    assert (large.optimizer.warmup_samples, large.optimizer.weight_decay) == (40, 0.2)
    assert [term.name for term in tune.objective] == ["siglip"]
    import yaml

    assert validate(yaml.safe_load(to_yaml(config)), PretrainConfig, label="again") == config


def test_every_problem_of_every_stage_is_said_at_its_place():
    stages = [
        {**TREE["stages"][0], "seed": 1, "reduction": {"mask_ratoi": 0.5}},
        {"name": "b", "samples": 5, "optimizer": {"schedule": {"name": "constan"}}},
        {"name": "c", "samples": 5},
    ]
    with pytest.raises(ConfigError) as caught:
        validate({**TREE, "stages": stages}, PretrainConfig, label="test")
    said = str(caught.value)
    assert "stages.0.seed: a stage cannot change this" in said
    assert (
        "stages.0.reduction.random.mask_ratoi: there is no such key, did you mean 'mask_ratio'"
        in said
    )
    assert "stages.1.optimizer.schedule.name: got 'constan', did you mean 'constant'?" in said
    assert "stages.2: samples 5 is less than one global batch of 10" in said


def test_a_kept_optimizer_refuses_a_stage_that_changes_what_its_moments_belong_to():
    kept = {"name": "b", "samples": 50, "keep_optimizer": True}
    fine = {
        "global_batch_size": 25,
        "reduction": {"mask_ratio": 0.0},
        "objective": {"name": "clip"},
    }
    validate({**TREE, "stages": [TREE["stages"][0] | {"image_size": None, "context_length": None},
                                 {**kept, **fine}]}, PretrainConfig, label="test")  # fmt: skip
    wrong = {"image_size": 96, "optimizer": {"beta2": 0.9, "learning_rate": 1.0}}
    with pytest.raises(ConfigError) as caught:
        validate({**TREE, "stages": [TREE["stages"][0], {**kept, **wrong}]}, PretrainConfig,
                 label="test")  # fmt: skip
    assert "stages.1.keep_optimizer: " in str(caught.value)
    assert "image_size, context_length, optimizer.beta2 changes in this stage" in str(caught.value)
    own = {**TREE, "towers": {"image": {"learning_rate": 0.1}}}
    alike = TREE["stages"][0] | {"image_size": None, "context_length": None}
    slower = {**kept, "optimizer": {"learning_rate": 1.0}}
    with pytest.raises(ConfigError, match=r"optimizer\.learning_rate beside towers"):
        validate({**own, "stages": [alike, slower]}, PretrainConfig, label="test")
    with pytest.raises(ConfigError, match="the first stage has no optimizer to keep"):
        validate({**TREE, "stages": [kept]}, PretrainConfig, label="test")


def test_a_stage_with_data_of_its_own_starts_an_epoch_of_them():
    stages = [TREE["stages"][0], {"name": "b", "samples": 50, "data": {"manifest": "other"}},
              {"name": "c", "samples": 50, "data": {"manifest": "other"}}]  # fmt: skip
    first, second, third = Stages.of(
        validate({**TREE, "stages": stages}, PretrainConfig, label="test")
    ).stages
    assert (first.data_since, second.data_since, third.data_since) == (0, 140, 140)
    assert second.skipped(100) == ((140, 200),)  # 140 samples seen; epoch 2 of 100 starts at 200
    assert second.skipped(140) == ()
    assert third.skipped(100) == second.skipped(100)  # and goes on in it
    assert first.skipped(100) == second.skipped(None) == ()


def test_a_budget_that_is_not_the_sum_of_the_stages_is_refused():
    with pytest.raises(ConfigError, match=r"samples 100 is not the sum of the stages, 214"):
        validate({**TREE, "samples": 100}, PretrainConfig, label="test")


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 9)), min_size=1, max_size=5))
def test_no_sample_is_lost_or_seen_twice_between_stages(parts):
    stages = [
        {"name": str(i), "samples": batch * steps + (batch - 1), "global_batch_size": batch}
        for i, (steps, batch) in enumerate(parts)
    ]
    laid = Stages.of(validate({**TREE, "stages": stages}, PretrainConfig, label="test"))
    for before, after in zip(laid.stages, laid.stages[1:], strict=False):
        assert before.last_sample == after.first_sample
        assert before.last_step == after.first_step
    assert laid.num_steps == sum(steps for steps, _ in parts)
    assert laid.num_samples == sum(steps * batch for steps, batch in parts)
