"""The arguments that the commands share: a run is a file, plus dotted overrides.

Two flags in all.
"""

from __future__ import annotations

import argparse
import sys
from typing import TypeVar

from configs.registry import Config

Schema = TypeVar("Schema", bound=Config)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, its overrides, --dry-run and --print-config."""
    parser.add_argument(
        "config", metavar="CONFIG", help="a YAML file, or a shipped name (demo/...)"
    )
    parser.add_argument(
        "overrides",
        metavar="key.path=value",
        nargs="*",
        help="set one key of the configuration; the value is YAML, list items go by their number",
    )
    add_flags(parser)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --dry-run and --print-config."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="validate everything that can be validated, print the arithmetic in words, run "
        "nothing",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and exit"
    )


def load(options: argparse.Namespace, schema: type[Schema]) -> Schema | None:
    """Return the configuration that the options name.

    Print it and return None for --print-config.
    """
    from configs.load import load_config, to_yaml

    config = load_config(options.config, schema, options.overrides)
    if options.print_config:
        sys.stdout.write(to_yaml(config))
        return None
    return config
