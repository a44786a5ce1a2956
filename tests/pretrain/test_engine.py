"""The engine through real DeepSpeed at every ZeRO stage: gradients, accumulation."""

import pytest
import torch

from configs.load import to_yaml
from tests.pretrain.conftest import make_config, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def found(dataset, model_file, tmp_path_factory):
    """What engine_checks saved: found(check, world_size); one launch for each number of ranks."""
    folder = tmp_path_factory.mktemp("engine")
    config = make_config(dataset, model_file, folder / "run")
    (folder / "config.yaml").write_text(to_yaml(config))
    arguments = (str(folder / "config.yaml"), str(folder))
    checks = {1: ["gradients"], 2: ["gradients"], 4: ["gradients"]}
    for world_size, names in checks.items():
        run_ranks("engine_checks", world_size, *arguments, *names)
    return {
        (name, size): torch.load(folder / f"{name}-{size}.pt", weights_only=True)
        for size, names in checks.items()
        for name in names
    }


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
