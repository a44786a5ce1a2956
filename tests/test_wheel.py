"""The wheel, installed alone: curates on Ray from another folder, finds its YAML, needs no
torch.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.pretrain.conftest import make_dataset

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.ray]


def run(*words: str, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(
        words, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin folder of an empty environment with nothing but the wheel and its dependencies."""
    uv = str(Path(sys.executable).with_name("uv"))
    if not Path(uv).exists():
        pytest.skip("uv is not beside this Python; `make test` has it there")
    folder = tmp_path_factory.mktemp("wheel")
    run(uv, "build", "--quiet", "--wheel", "--out-dir", str(folder), str(ROOT), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"configs/demo/curate.yaml", "slurm/pretrain.sbatch", "slurm/job.sh"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
    run(uv, "venv", "--quiet", "--python", sys.executable, str(folder / "venv"), cwd=folder)
    python = folder / "venv/bin/python"
    constraints = str(ROOT / "constraints.txt")
    run(
        uv,
        "pip",
        "install",
        "--quiet",
        "--python",
        str(python),
        str(wheel),
        "-c",
        constraints,
        cwd=folder,
    )
    return python.parent


def test_the_installed_wheel_curates_on_ray_from_another_folder(installed, tmp_path):
    make_dataset(tmp_path / "raw", [40, 25])
    (tmp_path / "entries.txt").write_text("red\nblue\nsquare\n")
    command = (
        str(installed / "pairmill"), "curate", "demo/curate", "sources.0.shards=raw",
        "rules.1.min_side=18", "rules.2.metadata=entries.txt", "rules.2.t=20", "output=out",
    )  # fmt: skip
    printed = run(*command, cwd=tmp_path)
    assert "65" in printed
    assert (tmp_path / "out/manifest.json").is_file()
    assert (tmp_path / "out/00000.tar").is_file()


def test_the_installed_wheel_has_no_torch_and_says_what_pretraining_needs(installed, tmp_path):
    done = subprocess.run(
        [installed / "pairmill", "pretrain", "demo/pretrain"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "the package 'torch' is not installed" in done.stderr
    assert "pip install 'pairmill[all]'" in done.stderr
