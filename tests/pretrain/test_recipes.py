"""Every shipped recipe loads and dry-runs on the meta device; its arithmetic is the paper's."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from configs.load import SHIPPED, load_config
from pretrain.arithmetic import describe, describe_schedule, never_at_peak
from pretrain.build import stage_model_config
from pretrain.config import PretrainConfig
from pretrain.data.streaming import Stream
from pretrain.dry_run import describe_run
from pretrain.estimate import memory, step_flops, towers
from pretrain.stages import Stages

RECIPES = sorted(
    str(path.relative_to(SHIPPED).with_suffix(""))
    for path in (SHIPPED / "pretrain").rglob("*.yaml")
)

# Of each stage, from the papers and their configurations (learning rate, batch, warmup in samples,
# samples, image tokens with the class token, text tokens).
FLIP_TUNING = (1.024e-5, 65_536, 25.6e6, 128e6)
PUBLISHED = {
    "flip_b16_50": [(1.024e-3, 65_536, 51.2e6, 12.8e9, 99, 32), (*FLIP_TUNING, 197, 32)],
    "flip_b16_75": [(1.024e-3, 65_536, 51.2e6, 12.8e9, 50, 32), (*FLIP_TUNING, 197, 32)],
    "flip_l16_50": [(1.024e-3, 65_536, 51.2e6, 12.8e9, 99, 32), (*FLIP_TUNING, 197, 32)],
    "flip_l16_75": [(1.024e-3, 65_536, 51.2e6, 12.8e9, 50, 32), (*FLIP_TUNING, 197, 32)],
    "flip_h14_50": [(1.024e-3, 65_536, 256e6, 12.8e9, 129, 32), (*FLIP_TUNING, 257, 32)],
    "flip_h14_75": [(1.024e-3, 65_536, 256e6, 12.8e9, 65, 32), (*FLIP_TUNING, 257, 32)],
    "clipa_b16_i50_t16": [
        (2.048e-3, 65_536, 782 * 65_536, 6 * 400e6, 50, 16),
        (2.56e-5, 8_192, 3_072 * 8_192, 131.072e6, 197, 16),
    ],
    "clipa_l16_i17_t16": [
        (1.024e-3, 32_768, 1_563 * 32_768, 6 * 400e6, 17, 16),
        (2.24e-5, 7_168, 3_571 * 7_168, 131.072e6, 197, 16),
    ],
    "clipa_l16_i37_t8": [
        (1.024e-3, 32_768, 1_563 * 32_768, 6 * 400e6, 37, 8),
        (2.24e-5, 7_168, 3_571 * 7_168, 131.072e6, 197, 32),
    ],
    "clipa_v2_h14": [
        (2.048e-3, 65_536, 3_200 * 65_536, 1_281_167 * 10_000, 37, 8),
        (5.12e-5, 32_768, 800 * 32_768, 524.288e6, 180, 32),
        (6.4e-6, 16_384, 1_600 * 16_384, 131.072e6, 346, 32),
    ],
    "clipa_v2_l14": [
        (2.048e-3, 65_536, 800 * 65_536, 1_281_167 * 10_000, 37, 8),
        (5.12e-5, 32_768, 800 * 32_768, 524.288e6, 180, 32),
        (6.4e-6, 16_384, 1_600 * 16_384, 131.072e6, 346, 32),
    ],
    "openclip_b32": [(1e-3, 824 * 96, 2_000 * 79_104, 34e9, 50, 77)],
    "openclip_b16": [(5e-4, 176 * 192, 2_000 * 33_792, 12.8e9, 197, 77)],
    "metaclip_b16_400m": [(5e-4, 64 * 512, 2_000 * 32_768, 12.8e9, 197, 77)],
    "datacomp_small": [(5e-4, 4_096, 500 * 4_096, 12.8e6, 50, 77)],
    "datacomp_medium": [(5e-4, 4_096, 500 * 4_096, 128e6, 50, 77)],
    "datacomp_large": [(5e-4, 8_192, 500 * 8_192, 1.28e9, 197, 77)],
    "datacomp_xlarge": [(1e-3, 90_112, 10_000 * 90_112, 12.8e9, 257, 77)],
    "wfpp_cc12m": [
        (1e-3, 4 * 160, 10_000 * 640, 30 * 0.8 * 9.3e6, 197, 77),
        (1e-5, 4 * 160, 10_000 * 640, 9.3e6, 197, 77),
    ],
    "aclip_b16_yfcc15m": [(5e-4, 64 * 64, 15e6, 25 * 15e6, 101, 77)],  # 100 of 196 patches
}
FINAL = {"aclip_b16_yfcc15m": 1e-5 / 5e-4}  # share of the peak at the end
BETA2 = {"flip": 0.95, "clipa": 0.95, "datacomp_xlarge": 0.95}


def load(name: str) -> PretrainConfig:
    return load_config(f"pretrain/{name}", PretrainConfig)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads_and_dry_runs_without_allocating_its_model(recipe):
    config = load_config(recipe, PretrainConfig)
    data = {stage.number: Stream(("x.tar",)) for stage in Stages.of(config).stages}
    tracemalloc.start()
    said = describe_run(config, data, world_size=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6
    assert len(said) == 4 * len(data) + 1
    assert f"{Stages.of(config).num_samples:,} samples" in said[-1]
    header = (SHIPPED / f"{recipe}.yaml").read_text().partition("name:")[0]
    assert "arXiv:" in header


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_arithmetic_of_a_recipe_is_the_papers(name):
    stages = Stages.of(load(name)).stages
    assert len(stages) == len(PUBLISHED[name])
    for stage, (rate, batch, warmup, samples, image, text) in zip(
        stages, PUBLISHED[name], strict=True
    ):
        optimizer = stage.config.optimizer
        assert optimizer.learning_rate == pytest.approx(rate)
        assert stage.batch == batch
        assert optimizer.warmup_samples == pytest.approx(warmup)
        assert stage.config.samples == pytest.approx(samples)
        assert stage.num_steps == int(samples) // batch
        assert optimizer.beta2 == next((b for k, b in BETA2.items() if name.startswith(k)), 0.98)
        if warmup:  # half way up, at the peak, at the end
            half = stage.first_sample + int(warmup) // (2 * batch) * batch - batch
            assert stage.learning_rate(half) == pytest.approx(rate / 2, rel=0.02)
        peak = stage.first_sample + -(-int(warmup) // batch) * batch
        assert stage.learning_rate(peak) == pytest.approx(rate, rel=1e-6)
        last = stage.learning_rate(stage.last_sample - batch) / rate
        assert last == pytest.approx(FINAL.get(name, 0.0), abs=1e-3)
        image_tower, text_tower = towers(stage, stage_model_config(stage.config))
        assert (image_tower.tokens, text_tower.tokens) == (image, text)


def test_learning_rates_follow_the_papers_rules_of_the_batch():
    for name, rules in {
        "flip": (4e-6, 4e-8),
        "clipa": (8e-6, 8e-7),
        "v2": (8e-6, 4e-7, 1e-7),
    }.items():
        for recipe in PUBLISHED:
            if recipe.startswith("clipa_v2") != (name == "v2") or not recipe.startswith(
                ("clipa",) if name == "v2" else (name,)
            ):
                continue
            for stage, rule in zip(Stages.of(load(recipe)).stages, rules, strict=True):
                rate = rule * stage.batch / 256
                assert stage.config.optimizer.learning_rate == pytest.approx(rate)


# open_clip's docs/model_profile.csv and reference/training.md C.2: GFLOPs forward, image and text.
@pytest.mark.parametrize(
    ("recipe", "stage", "image", "text"),
    [
        ("openclip_b32", 0, 8.82, 5.96),
        ("openclip_b16", 0, 35.13, 5.96),
        ("datacomp_xlarge", 0, 162.02, 13.30),
        ("clipa_b16_i50_t16", 0, 8.64, 1.21),
        ("clipa_l16_i37_t8", 0, 22.54, 1.36),
        ("clipa_l16_i17_t16", 0, 10.32, 2.73),
        ("clipa_v2_h14", 0, 46.84, 4.84),
    ],
)
def test_the_flop_formula_gives_the_published_profile(recipe, stage, image, text):
    laid = Stages.of(load(recipe)).stages[stage]
    model = stage_model_config(laid.config)
    found = [tower.flops / 1e9 for tower in towers(laid, model)]
    assert found == pytest.approx([image, text], rel=0.012)
    assert step_flops(laid, model) == 3 * sum(t.flops for t in towers(laid, model))


def test_the_batch_is_said_as_nodes_times_ranks_times_micro_batches(monkeypatch):
    config = load("metaclip_b16_400m").model_copy(update={"micro_batch_size": 512})
    stage = Stages.of(config).stages[0]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    said = describe(stage, Stream(("x.tar",)), world_size=16)
    assert "global batch 32,768 = 2 nodes x 8 ranks x 512 samples x 4 micro-batches; " in said
    assert "390,625 steps make 12,800,000,000 samples" in said
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert "= 16 ranks x 512 samples x 4 micro-batches" in describe(
        stage, Stream(("x.tar",)), world_size=16
    )
    assert describe_schedule(stage).startswith(
        "learning rate 0.0005 after 2,000.0 steps of warmup, then cosine"
    )
    assert never_at_peak(stage) is None
    short = replace(stage, config=config.model_copy(update={"samples": 1000 * 32_768}))
    assert describe_schedule(short) == never_at_peak(short)
    assert describe_schedule(short).startswith(
        "WARNING: the warmup of 2,000.0 steps is longer than the 1,000 steps that there are: the "
        "learning rate ends at 0.00025 and never comes to 0.0005"
    )


def test_zero_divides_its_share_of_the_memory_among_the_ranks():
    config = load("openclip_b16")
    model = stage_model_config(config)

    def of(stage: int, precision: str = "bf16"):
        engine = config.engine.model_copy(update={"zero_stage": stage, "precision": precision})
        laid = Stages.of(config.model_copy(update={"engine": engine})).stages[0]
        return memory(laid, model, num_parameters=800, world_size=8, micro_batch=4)

    assert [of(1).weights, of(1).gradients, of(1).optimizer] == [1600, 1600, 800 * 12 // 8]
    assert [of(2).gradients, of(3).weights] == [200, 200]
    assert [of(0, "fp32").weights, of(0, "fp32").optimizer] == [3200, 6400]
    assert of(1).activations > 4 * 12 * (197 * 768 + 77 * 512) * 16 * 2
    assert of(1).total == sum((of(1).weights, of(1).gradients, of(1).optimizer, of(1).activations))


def test_the_small_recipes_spend_less_than_half_of_the_full_ones_flops():
    def flops(name: str) -> int:
        stages = Stages.of(load(f"small/{name}")).stages
        return sum(
            (s.last_sample - s.first_sample) * step_flops(s, stage_model_config(s.config))
            for s in stages
        )

    assert 2 * flops("clipa") <= flops("full")
    assert 2 * flops("flip") <= flops("full")


def test_the_table_of_recipes_names_every_one():
    table = (Path(SHIPPED) / "README.md").read_text()
    for recipe in RECIPES:
        stem = recipe.removeprefix("pretrain/").removeprefix("small/")
        assert stem in table, f"configs/README.md has no row for {recipe}"
