"""A run is a file: YAML with one `extends:` parent and dotted overrides, validated all at once.

    config = load_config("demo/pretrain", PretrainConfig, ["optimizer.learning_rate=1.0e-3"])

Rules (DESIGN section 2): sections merge by key, lists are replaced whole, a section whose `name`
changes starts afresh; unknown keys are refused; every problem of a file is reported in one error.
A name is a path, or the name of a file shipped in this folder (with or without ".yaml").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from configs.errors import ConfigError, did_you_mean
from configs.registry import Config

SHIPPED = Path(__file__).parent
Schema = TypeVar("Schema", bound=Config)
Tree = dict[str, Any]


def find_config(name: str | Path, *, beside: Path | None = None) -> Path:
    """Return the file of a path (relative to `beside` first) or of a shipped file's name."""
    text = str(name)
    stems = [text, f"{text}.yaml"]
    folders = [beside] if beside is not None else []
    for folder in [*folders, Path(), SHIPPED, SHIPPED.parent]:
        for stem in stems:
            candidate = folder / stem
            if candidate.is_file():
                return candidate
    near = did_you_mean(text.removesuffix(".yaml"), shipped_configs())
    shipped = "" if near != "." else f" Shipped: {_by_folder(shipped_configs())}."
    raise ConfigError(
        f"there is no configuration {text!r}: neither a file of that path nor one shipped with "
        f"pairmill{near} Give the path of a YAML file, or a shipped name.{shipped}"
    )


def shipped_configs() -> list[str]:
    """Return the names of the shipped configurations, in order."""
    found = (path.relative_to(SHIPPED).with_suffix("") for path in SHIPPED.rglob("*.yaml"))
    return sorted(str(name) for name in found if "descriptions" not in name.parts)


def _by_folder(names: Iterable[str]) -> str:
    """Write names as `folder/{a, b}`."""
    folders: dict[str, list[str]] = {}
    for name in names:
        folder, _, last = name.rpartition("/")
        folders.setdefault(folder, []).append(last)
    return "; ".join(f"{folder}/{{{', '.join(lasts)}}}" for folder, lasts in folders.items())


def _read(path: Path) -> Tree:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = str(error).replace('"<unicode string>"', path.name)
        raise ConfigError(f"{path} is not valid YAML: {where}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected `key: value` lines, got a {type(tree).__name__}; configs/demo has "
            "examples."
        )
    return tree


def merge(parent: Tree, child: Tree, *, is_section: bool = True) -> Tree:
    """Return `parent` with the keys of `child`, section by section (the rules above)."""
    # Only a section's `name` chooses a variant; at the top level it labels the run. A parent
    # without one has the default variant: keys that another does not know are refused later.
    if is_section and "name" in child and "name" in parent and child["name"] != parent["name"]:
        return child
    merged = dict(parent)
    for key, value in child.items():
        inherited = merged.get(key)
        if isinstance(value, dict) and isinstance(inherited, dict):
            value = merge(inherited, value)
        merged[key] = value
    return merged


def _resolve_file(path: Path, seen: tuple[Path, ...] = ()) -> Tree:
    if path.resolve() in seen:
        chain = " -> ".join(str(p) for p in (*seen, path.resolve()))
        raise ConfigError(f"`extends` goes in a circle: {chain}. Take one of them out.")
    tree = _read(path)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    parent_path = find_config(parent, beside=path.parent)
    inherited = _resolve_file(parent_path, (*seen, path.resolve()))
    return merge(inherited, tree, is_section=False)


def apply_override(tree: Tree, override: str) -> None:
    """Set one dotted `key.path=value` in `tree`.

    The value is YAML, list items go by their number.
    """
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"override {override!r}: expected key.path=value, for example seed=1 or "
            "rules.0.min_words=3."
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    node: Any = tree
    for key in keys[:-1]:
        node = _step(node, key, override)
    last = keys[-1]
    if isinstance(node, list):
        node[_list_position(node, last, override)] = value
    elif last == "name" and node is not tree and node.get("name", value) != value:
        node.clear()
        node["name"] = value
    else:
        inherited = node.get(last)
        both = isinstance(value, dict) and isinstance(inherited, dict)
        node[last] = merge(inherited, value) if both else value


def _is_position(override: str, key: str) -> bool:
    """Whether the part of an override's path behind `key` is a list's position."""
    keys = override.partition("=")[0].split(".")
    return keys[keys.index(key) + 1].isdigit()


def _list_position(node: list[Any], key: str, override: str) -> int:
    if key.isdigit() and int(key) < len(node):
        return int(key)
    raise ConfigError(f"override {override!r}: {key!r} is not a position in a list of {len(node)}.")


def _step(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_list_position(node, key, override)]
    inner = node.get(key)
    if inner is None and _is_position(override, key):
        raise ConfigError(
            f"override {override!r}: the configuration has no list {key!r} to change. Write the "
            f"whole list: {key}=[...]."
        )
    if inner is None:
        inner = node[key] = {}
    if not isinstance(inner, dict | list):
        raise ConfigError(f"override {override!r}: {key!r} is {inner!r}, which has no keys.")
    return inner


def resolve(name: str | Path, overrides: Iterable[str] = ()) -> Tree:
    """Return the plain tree of a file: its parents merged, then the overrides applied in order."""
    tree = _resolve_file(find_config(name))
    for override in overrides:
        apply_override(tree, override)
    return tree


def load_config(name: str | Path, schema: type[Schema], overrides: Iterable[str] = ()) -> Schema:
    """Resolve and validate one configuration; raise ConfigError with every problem in it."""
    return validate(resolve(name, overrides), schema, label=str(name))


def validate(tree: Mapping[str, Any], schema: type[Schema], *, label: str) -> Schema:
    """Validate a plain tree; raise ConfigError with every problem in it."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        found = error.errors(include_url=False)
        # A list whose items are wrong is not too short as well.
        places = [problem["loc"] for problem in found]
        problems = [
            _explain(problem, tree)
            for problem in found
            if problem["type"] != "too_short"
            or not any(p[: len(problem["loc"])] == problem["loc"] != p for p in places)
        ]
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise ConfigError("\n  ".join([f"{label}: {count}", *problems])) from None


def _explain(problem: Any, tree: Mapping[str, Any]) -> str:
    path, kind, got = _path(problem["loc"], tree), problem["type"], problem["input"]
    if kind == "union_tag_invalid":
        tag, tags = problem["ctx"]["tag"], problem["ctx"]["expected_tags"].replace("'", "")
        return f"{path}.name: got {tag!r}{did_you_mean(tag, tags.split(', '))} Known: {tags}"
    if kind == "union_tag_not_found":
        text = f"{path}: this section needs a `name` (got {_short(got)})"
        glued = isinstance(got, dict) and any(":" in str(key) for key in got)
        return text + ("; YAML wants a blank behind a colon: `name: X`" if glued else "")
    message = problem["msg"].removeprefix("Value error, ").replace("valid tuple", "valid list")
    text = f"{path}: {message}" if path else message
    if kind not in {"value_error", "required_key"}:
        text += f" (got {_short(got)})"
    looks_like_a_number = isinstance(got, str) and got[:1] in tuple("+-.0123456789")
    if looks_like_a_number and kind.startswith(("int_", "float_")):
        text += "; YAML reads 1e-3 and 12.8e9 as text: write 1.0e-3 and 12_800_000_000"
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _path(loc: Sequence[Any], tree: Any) -> str:
    """Write an error's location as a dotted path.

    Pydantic puts union tags into it, and the place in a list where one section stands for a list of
    one: leave them out.
    """
    path, node = [], tree
    for part in loc:
        unwritten = isinstance(node, dict) and part not in node
        if unwritten and (node.get("name") == part or isinstance(part, int)):
            continue
        path.append(str(part))
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            node = None
    return ".".join(path)


def to_yaml(config: Config) -> str:
    """Write the resolved configuration as YAML, in the order of its schema."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def digest(config: Config) -> str:
    """Return the sha256 (hex) of the resolved configuration in canonical JSON."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
