"""The arguments that the commands share: a run is a file, plus dotted overrides.

Two flags in all.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from configs.registry import Config

Schema = TypeVar("Schema", bound="Config")
Completer = Callable[..., list[str]]


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, its overrides, --dry-run and --print-config."""
    complete(
        parser.add_argument(
            "config", metavar="CONFIG", help="a YAML file, or a shipped name (demo/...)"
        ),
        complete_config,
    )
    overrides = parser.add_argument(
        "overrides",
        metavar="key.path=value",
        nargs="*",
        default=None,  # an empty list; without it argparse says that one is required
        help="set one key of the configuration; the value is YAML, list items go by their number",
    )
    complete(overrides, complete_override)
    add_flags(parser)


def complete(action: argparse.Action, completer: Completer) -> None:
    """Say what completes an argument in a shell (`pairmill completion`)."""
    action.completer = completer  # type: ignore[attr-defined]


def complete_config(prefix: str, **_: object) -> list[str]:
    """Return the shipped configurations and the YAML files and folders that begin so."""
    from configs.load import shipped_configs

    folder, start = os.path.split(prefix)
    place = Path(folder or ".")
    found = [
        os.path.join(folder, path.name) + ("/" if path.is_dir() else "")
        for path in (sorted(place.iterdir()) if place.is_dir() else ())
        if path.name.startswith(start) and (path.is_dir() or path.suffix in (".yaml", ".yml"))
    ]
    shipped = [name for name in shipped_configs() if name.startswith(prefix)]
    return [*shipped, *(name for name in found if not name.startswith("."))]


def complete_override(prefix: str, parsed_args: argparse.Namespace, **_: object) -> list[str]:
    """Return the dotted keys of the configuration named before, with their equals sign."""
    from configs.errors import PairmillError
    from configs.load import resolve

    try:
        tree = resolve(parsed_args.config)
    except (PairmillError, OSError):
        return []
    return [key for key in _keys(tree) if key.startswith(prefix)]


def _keys(tree: object, path: str = "") -> list[str]:
    items: list[tuple[object, object]] = []
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    found = [key for name, value in items for key in _keys(value, f"{path}{name}.")]
    return [f"{path.removesuffix('.')}=", *found] if path else found


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
