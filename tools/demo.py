"""`make demo`: the whole chain on real pairs, from raw shards to a report, by the commands a user
types.

    pool (tools.glyph_pool) -> curate -> pretrain -> evaluate -> report

Each step is a command line that is printed before it runs, and can be typed by hand. A second run
skips what is done.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

from configs.progress import format_duration

_SUMMARY = "Make a pool of real image-text pairs, curate it, train CLIP on it, evaluate it, report."


def steps(folder: Path) -> list[tuple[str, list[str]]]:
    """Return what each step does and its command line; every file goes below `folder`."""
    pool, dataset, run, results = (
        str(folder / name) for name in ("pool", "dataset", "pretrain", "results")
    )
    evaluation = [
        f"datasets.{i}.path={pool}/eval/{name}"
        for i, name in enumerate(("serif", "serif-letters-digits", "unseen"))
    ]
    return [
        (
            "1/5 raw shards: glyphs of bundled fonts and their Unicode names",
            ["tools.glyph_pool", pool],
        ),
        (
            "2/5 curate: filter and balance them into a dataset",
            [
                *("tools.cli", "curate", "demo/curate", f"output={dataset}"),
                *(f"sources.0.shards={pool}/train", f"rules.2.metadata={pool}/metadata.txt"),
            ],
        ),
        (
            "3/5 pretrain: a CLIP model on the dataset",
            ["tools.cli", "pretrain", "demo/pretrain", f"output={run}", f"data.manifest={dataset}"],
        ),
        (
            "4/5 evaluate: zero-shot and retrieval on what was held out",
            [
                *("tools.cli", "evaluate", run, "demo/evaluate", f"output={results}"),
                *(f"baseline.reference={dataset}", *evaluation),
            ],
        ),
        (
            "5/5 report: one page",
            ["tools.cli", "report", str(folder), f"--output={folder / 'report.html'}"],
        ),
    ]


def main() -> int:
    """Run the chain; return the exit code of the first step that fails."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=_SUMMARY)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/demo"))
    folder = parser.parse_args().folder
    started = time.monotonic()
    for title, words in steps(folder):
        module, *arguments = words
        shown = ["pairmill", *arguments] if module == "tools.cli" else ["python", "-m", *words]
        print(f"\n== {title}\n$ {shlex.join(shown)}", flush=True)
        code = subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
        if code:
            print(f"demo: this step ended with exit code {code}; see above.", file=sys.stderr)
            return code
    print(done_line(time.monotonic() - started, folder / "report.html"))
    return 0


def done_line(seconds: float, page: Path) -> str:
    """Return what the demo prints last."""
    return f"\n== done in {format_duration(seconds)}: open {page}"


if __name__ == "__main__":
    sys.exit(main())
