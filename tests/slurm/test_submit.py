"""What `pairmill submit` makes of a site and a run, and how it reads Slurm's answers; no Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import SHIPPED, load_config, validate
from slurm import provenance
from slurm.pipeline import PipelineConfig
from slurm.site import SiteConfig
from slurm.status import from_sacct, from_scontrol
from slurm.submission import SCRIPTS, Submission, next_record, shown

# Printed by Slurm 22.05, shortened.
ARRAY = """\
JobId=7 ArrayJobId=5 ArrayTaskId=1 JobName=evaluate JobState=RUNNING Reason=None Restarts=1 \
ExitCode=0:0 RunTime=00:00:03 NodeList=n2
JobId=6 ArrayJobId=5 ArrayTaskId=0 JobName=evaluate JobState=FAILED Reason=NonZeroExitCode \
Restarts=0 ExitCode=4:0 RunTime=00:00:01 NodeList=n1
"""
ACCOUNTS = "FAILED|4:0|n[1-2]|00:00:01\nCANCELLED by 1000|0:15|n1|00:01:00\n"


def submission(tmp_path: Path, *flags: str, **site: object) -> Submission:
    config = validate(site, SiteConfig, label="site")
    return Submission("pretrain", tmp_path, tmp_path, "name: x\n", (), flags, config)


def test_what_is_typed_holds_over_the_kind_and_the_kind_over_the_site(tmp_path):
    site = {
        "sbatch": {"time": "1:00", "exclusive": True, "nice": False},
        "pretrain": {"nodes": 2, "gpus-per-node": "a100:4"},
    }
    job = submission(tmp_path, "--nodes=8", **site)
    command = job.command(tmp_path / "record", after=["3", "4"])
    assert command[:2] == ["sbatch", "--parsable"]
    assert command[3:-3] == [
        *("--time=1:00", "--exclusive", "--nodes=2", "--gpus-per-node=a100:4", "--nodes=8"),
        "--dependency=afterok:3:4",
    ]
    assert command[-3:] == [
        "--kill-on-invalid-dep=yes",
        str(SCRIPTS / "pretrain.sbatch"),
        str(tmp_path / "record/config.yaml"),
    ]
    assert job.num_processes() == 32
    assert submission(tmp_path).num_processes() == 1


def test_a_container_is_words_of_srun_or_before_python(tmp_path):
    pyxis = {"name": "pyxis", "image": "a.sqsh", "mounts": ["/data:/data"]}
    variables = submission(tmp_path, container=pyxis).variables(tmp_path, "python")
    assert variables["PAIRMILL_SRUN"].startswith(
        "--container-image=a.sqsh --container-mounts=/data"
    )
    apptainer = {"name": "apptainer", "image": "a.sif", "binds": ["/data"]}
    variables = submission(tmp_path, container=apptainer).variables(tmp_path, "python")
    assert variables["PAIRMILL_PREFIX"] == "apptainer exec --nv --bind=/data a.sif"
    spaced = submission(tmp_path, container={"name": "apptainer", "image": "a b.sif"})
    with pytest.raises(ConfigError, match="has a space in it"):
        spaced.variables(tmp_path, "python")


def test_a_site_with_mistakes_is_refused_with_all_of_them():
    with pytest.raises(ConfigError) as caught:
        validate(
            {"sbatch": {"--time": 1}, "modules": [], "container": {"name": "docker"}},
            SiteConfig,
            label="site",
        )
    for part in ("without dashes, got --time", "modules: there is no such key", "Known: apptainer"):
        assert part in str(caught.value)


def test_the_shipped_examples_load():
    site = load_config(SHIPPED / "slurm/site_example.yaml", SiteConfig)
    assert set(SiteConfig.model_fields) - site.model_fields_set == {"processes_per_node"}
    pipeline = load_config(SHIPPED / "slurm/demo.yaml", PipelineConfig)
    assert [kind for kind, _ in pipeline.stages] == ["curate", "pretrain", "evaluate"]


def test_records_are_numbered_and_lines_can_be_pasted(tmp_path):
    (tmp_path / "slurm/pretrain-0007").mkdir(parents=True)
    (tmp_path / "slurm/curate-0009").mkdir()
    assert next_record(tmp_path, "pretrain").name == "pretrain-0008"
    assert shown({"A": "b c"}, ["sbatch", "x y"]) == "A='b c' sbatch 'x y'"


def test_states_are_read_from_scontrol_and_from_sacct():
    running, failed = from_scontrol(ARRAY)
    assert (running.state, running.exit_code, running.nodes) == ("RUNNING", "0", "n2")
    assert (failed.state, failed.exit_code, failed.reason) == ("FAILED", "4", "NonZeroExitCode")
    failed, cancelled = from_sacct(ACCOUNTS)
    assert (failed.state, failed.exit_code, failed.nodes) == ("FAILED", "4", "n[1-2]")
    assert (cancelled.state, cancelled.exit_code) == ("CANCELLED", "signal 15")


def test_no_secret_is_recorded(monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("PAIRMILL_API_TOKEN", "hidden")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    recorded = provenance.environment()
    assert recorded["NCCL_DEBUG"] == "INFO"
    assert "hidden" not in recorded.values()
