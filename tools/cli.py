"""The `pairmill` command: parses the line, imports the one part that it needs, turns errors into
exit codes.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 75 stopped on request and worth
requeueing. stdout carries results, stderr the log.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from configs.errors import PairmillError, did_you_mean

COMMANDS = (
    "curate",
    "index",
    "score",
    "pretrain",
    "evaluate",
    "export",
    "submit",
    "report",
    "doctor",
    "completion",
)
_DESCRIPTION = (
    "Raw image-text shards in; a curated dataset, a CLIP model and a scorecard out.\n\n"
    "  raw shards -> curate -> dataset -> pretrain -> checkpoint -> evaluate -> results -> report"
)
_EPILOG = (
    "CONFIG is a YAML file or the name of one that pairmill ships; key.path=value overrides a "
    "key:\n"
    "  pairmill curate demo/curate seed=1\n"
    "  pairmill pretrain my_run.yaml --dry-run\n"
    "`pairmill COMMAND --help` teaches each command."
)
_TRACEBACK = "PAIRMILL_TRACEBACK"


class _Parser(argparse.ArgumentParser):
    """Says what was probably meant, and where the help is."""

    def error(self, message: str) -> NoReturn:
        """Print a mistake of the command line and exit with 2."""
        mistaken = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if mistaken:
            known = re.findall(r"[\w-]+", mistaken[2])
            message = message.removesuffix(")") + ")" + did_you_mean(mistaken[1], known)
        self.exit(2, f"{self.prog}: {message}\n`{self.prog} --help` has examples.\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="pairmill",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name in COMMANDS:
        module = importlib.import_module(f"tools.commands.{name}")
        command = commands.add_parser(
            name,
            help=module.SUMMARY[0].lower() + module.SUMMARY[1:].rstrip("."),
            description=module.SUMMARY,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse a line whose overrides may stand on either side of a flag."""
    options, left = parser.parse_known_args(arguments)
    words = getattr(options, "overrides", getattr(options, "words", None))
    if hasattr(options, "foreign_flags"):  # flags of sbatch
        options.foreign_flags = [word for word in left if word.startswith("--") and len(word) > 2]
        left = [word for word in left if word not in options.foreign_flags]
    are_overrides = all("=" in word and not word.startswith("-") for word in left)
    if left and (words is None or not are_overrides):
        flags = [word.lstrip("-") for word in left if word.startswith("--") and "=" in word]
        hint = f" Keys of a configuration have no dashes: {' '.join(flags)}." if flags else ""
        parser.error(f"there is no argument {' '.join(left)}.{hint}")
    if words is not None:
        words.extend(left)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # set by a shell that asks what may follow
        import argcomplete

        argcomplete.autocomplete(parser)
    options = parse(parser, arguments)
    if options.version:
        from importlib.metadata import version

        print(f"pairmill {version('pairmill')}")
        return 0
    if options.command is None:
        parser.print_help()
        return 2
    try:
        code: int = options.run(options)
        return code
    except PairmillError as error:
        if os.environ.get(_TRACEBACK):
            raise
        print(f"pairmill {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if os.environ.get(_TRACEBACK):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(
            f"pairmill {options.command}: the operating system refused: "
            f"{error.strerror or error}{where}. Mend that and run the same line again: "
            "what is finished is not done again.",
            file=sys.stderr,
        )
        return 1
    except ModuleNotFoundError as error:
        ours = ("configs", "curation", "pretrain", "evaluation", "slurm", "tools")
        if os.environ.get(_TRACEBACK) or (error.name or "").split(".")[0] in ours:
            raise
        print(
            f"pairmill {options.command}: the package {error.name!r} is not installed. Install "
            "what "
            "this command needs: pip install 'pairmill[all]' (or [pretrain], [evaluate]).",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"pairmill {options.command}: interrupted; the same line continues.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
