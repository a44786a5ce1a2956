"""Zero-shot and retrieval as a user runs them: our one command against CLIP_benchmark's two.

`python -m tools.benchmark.clip_benchmark_peer DIR`. CLIP_benchmark is no dependency of ours, and
needs an older NumPy; both go into a folder that its process alone sees:
`pip install --no-deps --target DIR -r tools/benchmark/clip_benchmark.txt`

Both get the same checkpoint (an open_clip folder, random weights), the same pictures in the same
webdataset tars (with labels, and with a caption each), batch size, workers and float32. Whole
commands are timed, their start included, in turn. Their values are compared too: recall@5 and top-1
must agree.

Captions are encoded once by either, so that the ratio falls where they cost much. Ours encodes the
tokens up to a caption's end, theirs all 77 positions.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from evaluation.result import read_published
from tools.benchmark.evaluation import NUM_CLASSES, make_data, make_model
from tools.benchmark.ratio import alternate, seconds

_THEIRS = (
    "import sys; from pretrain.model.torchvision_ops import ensure_torchvision as ready; ready(); "
    "from clip_benchmark.cli import main; sys.exit(main())"
)
BATCH_SIZE, WORKERS = 64, 1
WANTED = 1.8


def make_folders(work: Path, num_images: int) -> dict[str, Path]:
    """Write the two datasets in CLIP_benchmark's layout, over the same tar."""
    tar = make_data(work / "data", num_images) / "images.tar"
    folders = {kind: work / kind for kind in ("classification", "retrieval")}
    for kind, folder in folders.items():
        (folder / "test").mkdir(parents=True)
        os.link(tar, folder / "test" / "0.tar")
        (folder / "test" / "nshards.txt").write_text("1")
        (folder / "dataset_type.txt").write_text(kind)
    names = "\n".join(f"thing {i}" for i in range(NUM_CLASSES))
    (folders["classification"] / "classnames.txt").write_text(names)
    templates = folders["classification"] / "zeroshot_classification_templates.txt"
    templates.write_text("a photo of {c}\n{c}")
    return folders


def theirs(site: Path, model: Path, folders: dict[str, Path], work: Path) -> None:
    """Run their two commands."""
    for kind, folder in folders.items():
        task = "zeroshot_classification" if kind == "classification" else "zeroshot_retrieval"
        words = ["eval", "--dataset", f"wds/{kind}", "--dataset_root", str(folder)]
        words += ["--model", f"local-dir:{model}", "--pretrained", "", "--task", task, "--no_amp"]
        words += ["--batch_size", str(BATCH_SIZE), "--num_workers", str(WORKERS), "--quiet"]
        words += ["--output", str(work / f"theirs-{kind}.json")]
        _run([sys.executable, "-W", "ignore", "-c", _THEIRS, *words], PYTHONPATH=str(site))


def ours(model: Path, folders: dict[str, Path], work: Path) -> None:
    """Run our command, with an empty cache and output."""
    place = Path(tempfile.mkdtemp(dir=work))
    config = {
        "name": "peer",
        "datasets": [{"path": str(folder)} for folder in folders.values()],
        "batch_size": BATCH_SIZE,
        "num_workers": WORKERS,
        "cache": str(place / "cache"),
        "output": str(work / "ours"),
    }
    (work / "peer.yaml").write_text(json.dumps(config))
    (work / "ours" / "results.jsonl").unlink(missing_ok=True)
    _run([sys.executable, "-m", "tools.cli", "evaluate", str(model), str(work / "peer.yaml")])


def _run(words: list[str], **environment: str) -> None:
    own = {**os.environ, **environment}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=own)
    if done.returncode:
        raise SystemExit(f"{' '.join(words[:8])} ... failed:\n{done.stderr[-2000:]}")


def value_lines(work: Path) -> list[str]:
    """Return both sides' values of what both measure."""
    rows = {row.metric: row.value for row in read_published(work / "ours")}
    lines = []
    for kind, pairs in (
        ("classification", (("acc1", "top1"),)),
        (
            "retrieval",
            (
                ("image_retrieval_recall@5", "t2i_recall@5"),
                ("text_retrieval_recall@5", "i2t_recall@5"),
            ),
        ),
    ):
        metrics = json.loads((work / f"theirs-{kind}.json").read_text())["metrics"]
        lines += [f"{b}: ours {rows[b]:.5f}, theirs {metrics[a]:.5f}" for a, b in pairs]
    return lines


def main() -> int:
    """Print the ratio; return 1 where it is short."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--model", default="small", help="small, or a model of open_clip")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("site", type=Path, help="the folder that CLIP_benchmark is installed in")
    options = parser.parse_args()
    if not (options.site / "clip_benchmark").is_dir():
        print(f"{options.site} holds no clip_benchmark: nothing measured.\n\n{__doc__}")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model, folders = (
            make_model(work / "model", options.model),
            make_folders(work, options.images),
        )
        ratio = alternate(
            f"{options.model}, zero-shot + retrieval of {options.images:,} images",
            lambda: ours(model, folders, work),
            lambda: theirs(options.site.resolve(), model, folders, work),
            repeats=options.repeats,
        )
        print("\n".join([ratio.line(WANTED), *value_lines(work)]), flush=True)
        again = seconds(
            lambda: _run(
                [sys.executable, "-m", "tools.cli", "evaluate", str(model), str(work / "peer.yaml")]
            )
        )
        print(
            f"our command again, all done: {again:.1f} s, {ratio.ours_s / again:.1f} times as fast"
        )
    return int(ratio.ratio < WANTED)


if __name__ == "__main__":
    raise SystemExit(main())
