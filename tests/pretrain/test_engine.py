"""The engine through real DeepSpeed at every ZeRO stage: gradients of the whole batch from
micro-batches and ranks, clipping, steps that are not finite, resuming.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import ConfigError
from configs.load import to_yaml
from pretrain.engine import Engine
from tests.pretrain.conftest import make_config, run_ranks
from tests.pretrain.objective_rows import ROWS, model_of, total_of

GOLDEN = Path(__file__).resolve().parents[1] / "golden/objectives/gradclip.npz"
pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def found(dataset, model_file, tmp_path_factory):
    """What engine_checks saved: found(check, world_size); one launch for each number of ranks."""
    folder = tmp_path_factory.mktemp("engine")
    config = make_config(dataset, model_file, folder / "run")
    (folder / "config.yaml").write_text(to_yaml(config))
    arguments = (str(folder / "config.yaml"), str(folder))
    checks = {
        1: ["gradients", "descent"],
        2: ["gradients", "repeated", "descent", "not_finite", "resumed", "golden"],
        4: ["gradients", "descent"],
    }
    for world_size, names in checks.items():
        run_ranks("engine_checks", world_size, *arguments, *names)
    return {
        (name, size): torch.load(folder / f"{name}-{size}.pt", weights_only=True)
        for size, names in checks.items()
        for name in names
    }


def test_what_the_engine_cannot_do_is_refused_where_it_is_asked_for(dataset, model_file, tmp_path):
    def offloaded(stage: int, **what):
        engine = {"zero_stage": stage, "deepspeed": {"zero_optimization": what}}
        return make_config(dataset, model_file, tmp_path / "run", engine=engine)

    offloaded(1, offload_optimizer={"device": "cpu"})
    with pytest.raises(ConfigError, match="offload_optimizer needs zero_stage 1 or more, got 0"):
        offloaded(0, offload_optimizer={"device": "cpu"})
    with pytest.raises(ConfigError, match="offload_param needs zero_stage 3 or more, got 2"):
        offloaded(2, offload_param={"device": "cpu"})
    with pytest.raises(ConfigError, match="offload to nvme is not supported"):
        offloaded(3, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"})
    half = {"zero_stage": 1, "precision": "fp16"}
    config = make_config(dataset, model_file, tmp_path / "run", engine=half)
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        Engine(model_of(ROWS[0][1], total_of(ROWS[0][0])), config, torch.device("cpu"))


def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def test_gradients_are_those_of_one_batch_on_one_rank_at_every_stage_and_in_micro_batches(found):
    reference: dict[str, dict[str, torch.Tensor]] = {}
    for world_size in (1, 2, 4):
        stages = set()
        for row, stage, num_micro_batches, gradients, norm in found["gradients", world_size]:
            whole = flat(reference.setdefault(row, gradients))
            assert flat(gradients).shape == whole.shape
            error = (flat(gradients) - whole).norm() / whole.norm()
            assert error <= 2e-6, (row, stage, num_micro_batches, world_size, float(error))
            assert norm == pytest.approx(float(whole.norm()), rel=1e-5)
            stages.add((stage, num_micro_batches > 1))
        assert {stage for stage, accumulated in stages if accumulated} == {0, 1, 2, 3}
    assert len(reference) >= 3


def test_repeated_backward_passes_without_a_boundary_are_wrong_where_gradients_are_partitioned(
    found,
):
    right = {stage: g for row, stage, _, g, _ in found["gradients", 2] if "lorentz" in row}
    for stage, gradients in found["repeated", 2]:  # the trap that the boundary is for
        error = (flat(gradients) - flat(right[stage])).norm() / flat(right[stage]).norm()
        assert error > 0.1, (stage, float(error))


def test_twenty_steps_of_plain_sgd_end_at_the_same_weights_at_every_stage_on_1_2_and_4_ranks(found):
    _, one = found["descent", 1][0]
    for world_size in (1, 2, 4):
        for stage, other in found["descent", world_size]:
            error = (flat(other) - flat(one)).norm() / flat(one).norm()
            assert error <= 1e-5, (stage, world_size, float(error))


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all_and_the_next_step_is_taken(found):
    for stage, precision, skipped, same, after, moved in found["not_finite", 2]:
        case = (stage, precision)
        assert skipped == (float("inf"), None, True), case
        assert same, case
        assert (after[1], after[2], moved) == (1.0, False, True), case


def test_a_resumed_engine_has_equal_weights_moments_and_clipping_at_every_stage(found):
    cases = found["resumed", 2]
    assert {stage for stage, *_ in cases} == {0, 1, 2, 3}
    for stage, precision, same_weights, same_moments, whole, parts in cases:
        assert same_weights, (stage, precision)
        assert same_moments, (stage, precision)
        assert whole == parts
        assert whole["clipping"]["mean"] > 0


def test_golden_sequences_of_norms_are_clipped_through_the_engine_as_by_the_released_codes(found):
    with np.load(GOLDEN) as golden:
        for case, stage, steps in found["golden", 2]:
            norms, thresholds, clipped = np.array(steps, dtype=float).T
            n = len(norms)
            np.testing.assert_allclose(norms, golden["seq/grad_norm"][:n], rtol=2e-6)
            expected = golden[f"{case}/post_clip_norm"][:n]
            np.testing.assert_allclose(clipped, expected, rtol=2e-6, err_msg=f"{case} {stage}")
            if case.startswith("autoclip"):
                np.testing.assert_allclose(thresholds, golden[f"{case}/threshold"][:n], rtol=2e-6)
        cases = {(case, stage) for case, stage, _ in found["golden", 2]}
        assert cases == {(f"zclip/{c}", 2) for c in ("default", "mean")} | {
            ("zclip/default", 0), ("autoclip/p10", 2)
        }  # fmt: skip
