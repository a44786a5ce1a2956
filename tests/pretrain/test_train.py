"""The trainer on real DeepSpeed: stop and resume, one rank and two, damaged checkpoints,
signals.
"""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import CheckpointError, ConfigError, UsageError
from configs.load import to_yaml
from curation.manifest import manifest_of_tars
from pretrain.checkpoint import model_folder, read_record
from pretrain.config import TokenizerConfig
from pretrain.dry_run import dry_run
from pretrain.model.clip import ClipModel, read_model_config
from pretrain.optimizer import parameter_groups
from pretrain.run_lock import lock_folder
from pretrain.telemetry import Telemetry
from pretrain.throughput import Throughput
from tests import warm
from tests.pretrain.conftest import TINY_MODEL, make_config, png, run_ranks, write_tar

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore")]

TIMES = {"samples_per_second", "data_wait_fraction", "eta_seconds", "seconds", "peak_memory_bytes",
         "checkpoint_stall_seconds", "checkpoint_stall_fraction",
         "model_flops_per_second", "mfu"}  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    loaded = load_file(model_folder(run) / "open_clip_model.safetensors")
    return {name: tensor.clone() for name, tensor in loaded.items()}  # not a view of the file


def rows(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write_config(config) -> str:
    path = Path(config.output).with_suffix(".yaml")
    path.write_text(to_yaml(config))
    return str(path)


def train(config, world_size: int = 1, stops: tuple[int, ...] = (0,)) -> Path:
    """Train in one launch, stopping and starting again at each of `stops` (0: the end)."""
    path = write_config(config)
    run_ranks("train", world_size, *[word for stop in stops for word in (path, str(stop))])
    return Path(config.output)


def test_training_lowers_the_loss_and_one_rank_and_two_end_with_the_same_model(
    dataset, model_file, tmp_path
):
    one = train(make_config(dataset, model_file, tmp_path / "one", samples=480))
    two = train(make_config(dataset, model_file, tmp_path / "two", samples=480), world_size=2)
    losses = [row["loss"] for row in rows(one)]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert rows(one)[0]["loss"] == pytest.approx(rows(two)[0]["loss"], rel=1e-6)
    for name, tensor in weights(one).items():  # Adam magnifies rounding: closeness, not equality
        torch.testing.assert_close(tensor, weights(two)[name], atol=2e-3, rtol=0)


@pytest.mark.soak  # Inductor compiles for half a minute
def test_compiled_blocks_give_the_losses_of_eager_ones_and_stop_and_go_on(
    dataset, model_file, tmp_path
):
    eager = train(make_config(dataset, model_file, tmp_path / "eager", samples=240))
    engine = {"compile": True}
    config = make_config(dataset, model_file, tmp_path / "compiled", samples=240, engine=engine)
    compiled = train(config, stops=(3, 0))
    assert weights(eager).keys() == weights(compiled).keys()
    for row, other in zip(rows(eager), rows(compiled), strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)


def test_bad_samples_are_counted_and_named_once_over_ranks_and_restarts(model_file, tmp_path):
    good = [(f"{i:03d}", {"png": png(i, 16, i), "txt": b"a red square"}) for i in range(30)]
    bad = [(f"bad{i}", {"png": png(i, 16, i)[:60], "txt": b"a blue square"}) for i in range(2)]
    write_tar(tmp_path / "data/0.tar", [*good, *bad])
    manifest = manifest_of_tars(tmp_path / "data")
    data = {"manifest": str(manifest.folder), "num_workers": 0, "max_bad_fraction": 0.5}
    config = make_config(manifest, model_file, tmp_path / "parts", data=data, samples=128)
    parts = train(config, world_size=2, stops=(3, 0))
    whole = train(make_config(manifest, model_file, tmp_path / "whole", data=data, samples=128))

    def skipped(run: Path) -> list[float]:
        return [row["skipped_samples"] for row in rows(run)]

    def named(run: Path) -> list[str]:
        files = sorted(run.glob("bad_samples-*.jsonl"))
        return sorted(line for file in files for line in file.read_text().splitlines())

    starts = [json.loads(line) for line in (parts / "starts.jsonl").read_text().splitlines()]
    assert [(s["reason"], s["samples_seen"], s["ranks"]) for s in starts] == [
        ("start", 0, 2),
        ("resume", rows(parts)[2]["samples_seen"], 2),
    ]
    assert skipped(parts)[-1] == len(named(parts)) >= 4 * 2
    assert named(parts) == named(whole)
    assert [r["skipped_samples"] for r in rows(parts)] == [
        r["skipped_samples"] for r in rows(whole)
    ]


def test_a_damaged_checkpoint_falls_back_loudly_to_the_one_before(dataset, model_file, tmp_path):
    intervals = {"log_samples": 16, "checkpoint_samples": 48, "keep_checkpoints": 9}
    config = make_config(dataset, model_file, tmp_path / "run", intervals=intervals)
    run = train(config)
    before = weights(run)
    newest = run / "checkpoints/samples-000000000160"
    weights_file = newest / "model/open_clip_model.safetensors"
    data = bytearray(weights_file.read_bytes())
    data[len(data) // 2] ^= 1
    weights_file.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"damaged: model/open_clip_model\.safetensors has changed"
    ):
        read_record(newest)
    said = run_ranks("train", 1, str(tmp_path / "run.yaml"), "0")
    assert "WARNING" in said
    assert "samples-000000000144 at 144 samples" in said
    assert equal(before, weights(run))
    assert read_record(newest).step == 10
    assert newest.with_name(f"damaged-{newest.name}").is_dir()


def test_a_run_is_not_continued_with_another_configuration_or_model(dataset, tmp_path):
    model = tmp_path / "model.json"
    model.write_text(json.dumps(TINY_MODEL))
    train(make_config(dataset, model, tmp_path / "run"), stops=(2,))
    changed = make_config(dataset, model, tmp_path / "run", seed=4, samples=320)
    text_cfg = {**TINY_MODEL["text_cfg"], "heads": 4}
    model.write_text(json.dumps({**TINY_MODEL, "text_cfg": text_cfg}))
    done = warm.run("tools.cli", ["pretrain", write_config(changed)])
    assert done.returncode == 1
    assert "is of another run: samples was 160, now 320; seed was 3, now 4; " in done.stderr
    assert "model text_cfg.heads was 2, now 4" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_saves_and_exits_with_75_and_the_same_line_finishes(
    dataset, model_file, tmp_path, number
):
    data = {"manifest": str(dataset.folder), "window_shards": 2, "num_workers": 1}
    config = make_config(dataset, model_file, tmp_path / "run", samples=3_200, data=data)
    command = ["tools.cli", ["pretrain", write_config(config)]]
    process = warm.start(*command, split=True)
    for line in process.stderr:
        if "160/3,200 samples" in line:
            os.killpg(process.pid, number)
            break
    out, err = process.communicate(timeout=300)
    assert process.wait() == 75, err
    assert "stopped on request" in out
    assert "Traceback" not in err
    assert 10 <= read_record(model_folder(tmp_path / "run").parent).step < 200
    if number == signal.SIGTERM:  # once is enough for the second half
        return
    done = warm.run(*command)
    assert done.returncode == 0, done.stderr
    assert "continuing test from" in done.stderr
    assert "finished at 3,200 samples" in done.stdout


def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(dataset, model_file, tmp_path):
    optimizer = {"learning_rate": 1.0e30, "clipping": {"name": "none"}}
    config = make_config(dataset, model_file, tmp_path / "run", optimizer=optimizer)
    done = warm.run("tools.cli", ["pretrain", write_config(config)])
    assert done.returncode == 1
    assert "training diverged by" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_second_process_on_the_same_run_folder_is_refused(tmp_path):
    lock = lock_folder(tmp_path)
    with pytest.raises(UsageError, match="another process is training into"):
        lock_folder(tmp_path)
    lock.close()
    lock_folder(tmp_path).close()


def test_a_dry_run_says_the_arithmetic_without_training(dataset, model_file, tmp_path):
    text = dry_run(make_config(dataset, model_file, tmp_path / "run"), seconds=0.1)
    assert "global batch 16 = 1 rank x 16 samples; 10 steps make 160 samples" in text
    assert "8 of 16 patches kept" in text
    assert re.search(r"data alone [1-9][\d,]* samples/s \(0 workers\)", text)
    assert re.search("limit.*raise data.num_workers from 0 to|all .* are used", text)
    assert not (tmp_path / "run").exists()


def test_the_log_of_a_resumed_run_drops_the_rows_after_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"samples_seen": 16}\n{"samples_seen": 32}\n{"samples_se')
    Telemetry(tmp_path, samples_seen=16, total_samples=64).close()
    assert path.read_text() == '{"samples_seen": 16}\n'


def test_gains_biases_positions_and_scales_are_not_decayed(dataset, model_file):
    model = ClipModel(read_model_config(str(model_file)))
    groups = parameter_groups(model, make_config(dataset, model_file, Path("unused")))
    plain, decayed = sorted(groups, key=lambda group: group["weight_decay"])
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.2, 0.0)
    kept_out = {names[id(p)] for p in plain["params"]}
    assert "clip.logit_scale" in kept_out
    assert "clip.visual.positional_embedding" in kept_out
    assert not [name for name in kept_out if name.endswith("proj.weight")]
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_a_tokenizer_of_another_dataset_or_size_is_made_again(dataset, model_file, tmp_path):
    config = make_config(dataset, model_file, tmp_path / "run")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    fewer = config.model_copy(update={"tokenizer": TokenizerConfig(vocab_size=6)})
    (tmp_path / "fewer.yaml").write_text(to_yaml(fewer))
    names = [str(tmp_path / f"{name}.yaml") for name in ("run", "fewer", "run")]
    said = run_ranks("tokenizers", 1, *names).split("sizes ")[1].split()
    assert said[0] == said[2] != said[1] == "6"


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused(dataset, model_file, tmp_path):
    from pretrain.build import check_batch

    config = make_config(dataset, model_file, tmp_path / "run")
    with pytest.raises(ConfigError, match="global_batch_size 16 does not divide among 3 ranks"):
        check_batch(config, 3)


def test_a_mixture_with_clips_tokenizer_stops_and_goes_on_as_if_it_had_not(
    dataset, model_file, tmp_path
):
    mixture = [{"manifest": str(dataset.folder), "weight": w} for w in (0.7, 0.3)]
    data = {"mixture": mixture, "window_shards": 2,
            "captions": {"templates": ["{caption}", "a photo of {caption}"]}}  # fmt: skip
    changes = {"tokenizer": {"name": "clip"}, "samples": 64}
    parts, whole = (
        make_config(
            dataset, model_file, tmp_path / name, data={**data, "num_workers": n}, **changes
        )
        for n, name in enumerate("ab")
    )
    run_ranks("train", 1, write_config(parts), "2", write_config(parts), "0",
              write_config(whole), "0")  # fmt: skip
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    text = json.loads(
        (model_folder(tmp_path / "a") / "open_clip_config.json").read_text(encoding="utf-8")
    )["model_cfg"]["text_cfg"]
    assert (text["vocab_size"], "hf_tokenizer_name" in text) == (49408, False)


def test_the_throughput_test_says_which_side_is_the_limit_and_what_to_change():
    def advice(data: float, model: float | None, workers: int) -> str:
        return Throughput(
            data=data, model=model, num_workers=workers, num_cores=8, ranks_a_node=2
        ).advice()

    said = advice(500, 1500, 1)
    assert "500 samples/s (1 worker), model alone 1,500" in said
    assert "the data are the limit: raise data.num_workers from 1 to 4." in said
    assert "use smaller images" in advice(500, 9000, 1)
    assert "all 8 cores are used: store smaller images" in advice(2000, 9000, 4)
    assert "the model is the limit, with data for 2.0 times its speed" in advice(3000, 1500, 4)
    assert "model not measured: no device here" in advice(3000, None, 4)
