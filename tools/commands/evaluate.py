"""`pairmill evaluate`: checkpoints in, results out."""

from __future__ import annotations

import argparse
from pathlib import Path

from configs.errors import UsageError
from tools.commands.arguments import add_flags, complete, complete_config, load

SUMMARY = "Evaluate checkpoints: features once, every method on them."
EPILOG = """examples:
  pairmill evaluate runs/demo/pretrain demo/evaluate       a run (its latest checkpoint)
  pairmill evaluate A/checkpoints/samples-000000115200 B demo/evaluate seed=1
  pairmill evaluate runs/demo/pretrain evaluation/demo     every method, a few-shot sweep included
  pairmill evaluate ViT-B-32/openai my_suite.yaml          an open_clip model and its pretrained tag
  pairmill evaluate A B C evaluation/datacomp_38 root=/data/wds --part=2/8    an eighth of the queue
  torchrun --nproc-per-node=8 -m tools.cli evaluate A my_suite.yaml           ranks share the images
  pairmill evaluate --list                                 suites, their datasets, and methods
  pairmill evaluate --list evaluation/vtab root=/data/wds  which of a suite's datasets are there
  pairmill evaluate --cache-info runs/features             what the feature cache holds
  pairmill evaluate --lint openclip_results.csv evaluation/datacomp_38 output=RESULTS

CHECKPOINT is a run folder, a checkpoint, an open_clip folder, or an open_clip name/tag. The same
line again does only what is missing. Results go to `output` (runs/NAME/results), features to
`cache`; `pairmill report FOLDER` draws them, `predictions=true` adds what each sample got."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    words = parser.add_argument(
        "words",
        metavar="CHECKPOINT... CONFIG [key.path=value ...]",
        nargs="*",
        help="one or more checkpoints, then the suite, then overrides of its keys",
    )
    complete(words, complete_config)
    add_flags(parser)
    parser.add_argument("--part", help="I/N: this share of the queue; `slurm`: this array task's")
    parser.add_argument(
        "--list", action="store_true", help="say which suites, datasets and methods there are"
    )
    parser.add_argument(
        "--cache-info", action="store_true", help="say what the feature cache (a folder) holds"
    )
    parser.add_argument(
        "--lint",
        metavar="TABLE",
        type=Path,
        help="compare results with a published table (CSV: name, pretrained, a column a dataset)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    options.overrides = [word for word in options.words if "=" in word and not Path(word).exists()]
    names = [word for word in options.words if word not in options.overrides]
    if options.list:
        return _list(options, names)
    if options.cache_info:
        return _cache_info(options, names)
    if options.lint is not None:
        return _lint(options, names)
    if len(names) < 2:
        raise UsageError(
            f"expected CHECKPOINT... CONFIG, got {' '.join(options.words)!r}; for example: "
            "pairmill evaluate runs/demo/pretrain demo/evaluate."
        )
    from evaluation.config import EvaluateConfig

    *checkpoints, options.config = names
    config = load(options, EvaluateConfig)
    if config is None:
        return 0
    from evaluation.jobs import parse_part
    from evaluation.result import table
    from evaluation.suite import dry_run, evaluate

    part = parse_part(options.part)
    if options.dry_run:
        print(dry_run(config, checkpoints))
    else:
        rows = evaluate(config, checkpoints, part)
        print(table(rows))
        _print_absent(config)
    return 0


def _print_absent(config: object) -> None:
    from evaluation.config import EvaluateConfig
    from evaluation.datasets import is_there

    assert isinstance(config, EvaluateConfig)
    if config.absent != "report":
        return
    absent = [s.label for s in config.datasets if not is_there(config.place(s))]
    if absent:
        given = f"; no {config.average}" if config.average else ""
        print(
            f"\nabsent: {len(absent)} of {len(config.datasets)} datasets{given}: "
            f"{', '.join(absent)}"
        )


def _list(options: argparse.Namespace, names: list[str]) -> int:
    from evaluation.listing import list_all, list_suite

    if not names:
        print(list_all())
        return 0
    from evaluation.config import EvaluateConfig

    for options.config in names:
        config = load(options, EvaluateConfig)
        if config is not None:
            print(list_suite(config))
    return 0


def _cache_info(options: argparse.Namespace, names: list[str]) -> int:
    from evaluation.cache import describe
    from evaluation.config import EvaluateConfig

    if not names:
        print(describe(EvaluateConfig.model_fields["cache"].default))
    for name in names:
        if Path(name).is_dir():
            print(describe(Path(name)))
            continue
        options.config = name
        config = load(options, EvaluateConfig)
        if config is not None:
            print(describe(config.cache))
    return 0


def _lint(options: argparse.Namespace, names: list[str]) -> int:
    from evaluation.average import lint, lint_table, read_published_table
    from evaluation.config import EvaluateConfig
    from evaluation.result import read_published

    if len(names) not in (1, 2):
        raise UsageError("expected --lint TABLE [NAME/TAG] SUITE [output=RESULTS].")
    *model, options.config = names
    config = load(options, EvaluateConfig)
    if config is None:
        return 0
    rows = read_published(config.output_folder)
    if not rows:
        raise UsageError(
            f"--lint: there are no results in {config.output_folder}. Evaluate first, or give "
            "output=RESULTS."
        )
    table = read_published_table(options.lint)
    found = lint(rows, config, table, model=model[0] if model else None)
    print(lint_table(found))
    return 1 if any(one.is_bad for one in found) else 0
