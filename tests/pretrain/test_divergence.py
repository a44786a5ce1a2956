"""Steps that are not finite, in a real run on two ranks: skipped by both, then left behind."""

import json
from pathlib import Path

import pytest

from configs.load import to_yaml
from tests.pretrain.conftest import make_config, run_ranks
from tests.pretrain.test_train import equal, rows, weights

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]


def test_steps_that_are_not_finite_are_skipped_and_after_some_in_a_row_their_data_is_left_behind(
    dataset, model_file, tmp_path
):
    words = []
    for name, mode, most in (
        ("back", "poisoned", 2),
        ("on", "poisoned", 3),
        ("out", "left_out", 2),
    ):
        config = make_config(
            dataset,
            model_file,
            tmp_path / name,
            engine={"zero_stage": 1, "num_threads": 1},
            optimizer={"learning_rate": 0.003, "clipping": {"name": "zclip", "warmup_steps": 3}},
            micro_batch_size=4,
            intervals={"log_samples": 16, "checkpoint_samples": 32},
            stability={"max_skipped_steps": most},
        )
        path = Path(config.output).with_suffix(".yaml")
        path.write_text(to_yaml(config))
        words += [str(path), mode]
    said = run_ranks("divergence", 2, *words)

    on = rows(tmp_path / "on")
    assert [row["skipped_steps"] for row in on] == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2]
    assert [row["loss"] is None for row in on] == [False] * 3 + [True] * 2 + [False] * 5
    lines = (tmp_path / "on/spikes-1.jsonl").read_text().splitlines()
    spikes = [json.loads(line) for line in lines]
    assert [(s["position"], s["samples_seen"], s["loss"]) for s in spikes] == [
        (48, 64, None),
        (64, 80, None),
    ]
    assert all(len(spike["keys"]) == 8 for spike in spikes)

    assert "back to 32, and past the data at positions (32, 80)" in said
    back = rows(tmp_path / "back")
    assert (back[-1]["step"], back[-1]["skipped_steps"], back[-1]["rollbacks"]) == (10, 2, 1)
    assert (tmp_path / "back/spikes-1.jsonl").read_text().splitlines() == lines
    assert equal(weights(tmp_path / "back"), weights(tmp_path / "out"))
    assert not equal(weights(tmp_path / "back"), weights(tmp_path / "on"))
    losses = [row["loss"] for row in back]
    assert losses == [row["loss"] for row in rows(tmp_path / "out")]
