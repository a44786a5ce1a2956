"""The shape of the code: which package imports which, how long files and functions are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("configs", "curation", "pretrain", "evaluation", "slurm", "tools")
# DESIGN section 1: arrows follow the data and never run back.
ARROWS = {
    "configs": (),
    "curation": ("configs",),
    "pretrain": ("configs", "curation.manifest", "curation.shards"),
    "evaluation": ("configs", "pretrain.model", "pretrain.checkpoint"),
    "slurm": ("configs",),
    "tools": ("configs", "curation", "pretrain", "evaluation", "slurm"),
}
FOUNDATION = {"pydantic", "pydantic_core", "yaml", "numpy", "rich"}
ONLY_IMPORTER = {"ray": "curation/engine.py", "deepspeed": "pretrain/adapter.py"}


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def imports_of(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return set()


def imports(path: Path) -> set[str]:
    return {name for node in ast.walk(ast.parse(path.read_text())) for name in imports_of(node)}


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_follow_the_data_and_never_run_back(package):
    allowed = (package, *ARROWS[package])
    for path in sources(package):
        for name in imports(path):
            top = name.split(".")[0]
            if top in PACKAGES:
                fits = any(within(name, a) or (within(a, name) and a != name) for a in allowed)
                assert fits, f"{path.relative_to(ROOT)} imports {name}"


def test_the_ground_floor_stands_on_little():
    for path in sources("configs"):
        foreign = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names)
        assert foreign <= FOUNDATION | {"configs"}, path


def test_one_file_alone_imports_ray_and_one_deepspeed():
    for library, owner in ONLY_IMPORTER.items():
        users = [
            str(path.relative_to(ROOT))
            for package in PACKAGES
            for path in sources(package)
            if any(within(name, library) for name in imports(path))
        ]
        assert users == [owner]


def test_what_imports_torchvision_comes_behind_what_mends_its_import():
    """Beside a CPU build of torch open_clip cannot be imported first (pretrain.model)."""
    for package in ("pretrain", "evaluation", "tools"):
        for path in sources(package):
            lines = [
                (node.lineno, name)
                for node in ast.parse(path.read_text()).body
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in imports_of(node)
            ]
            needs = [
                n for n, name in lines if name.split(".")[0] in ("open_clip", "timm", "torchvision")
            ]
            menders = ("pretrain.model.clip", "pretrain.model.torchvision_ops")
            mends = [n for n, name in lines if name in menders]
            assert not needs or (mends and min(mends) < min(needs)), path.relative_to(ROOT)


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("pretrain.train", ["ray"]),
        ("pretrain.config", ["torch", "open_clip"]),
        ("curation.job", ["torch"]),
        # Of a worker, where every import is time before its first task.
        ("curation.scan", ["ray", "pydantic", "rich", "yaml", "fsspec", "pandas"]),
        ("curation.decide", ["ray", "rich", "yaml", "fsspec", "pandas", "regex", "ftfy"]),
        ("curation.report", ["ray", "yaml", "fsspec", "pandas"]),
        ("evaluation.suite", ["ray", "deepspeed", "curation", "open_clip", "sklearn"]),
        ("evaluation.identity", ["torch", "open_clip"]),
        ("evaluation.config", ["torch", "open_clip"]),
        ("slurm.submission", ["torch", "ray", "numpy"]),
        ("tools.cli", ["torch", "ray", "numpy", "pydantic"]),
    ],
)
def test_importing_a_part_leaves_the_others_alone(module, never):
    code = f"import sys, {module}; print([m for m in {never!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip().splitlines()[-1:] == ["[]"], done.stdout + done.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_files_and_functions_stay_short(package):
    for path in sources(package):
        text = path.read_text()
        assert text.count("\n") <= 400, f"{path.relative_to(ROOT)} is longer than 400 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path.relative_to(ROOT)}: {node.name} has {length} lines"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is(package):
    for path in sources(package):
        text = path.read_text()
        assert not text.strip() or ast.get_docstring(ast.parse(text)), path.relative_to(ROOT)
