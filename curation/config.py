"""The configuration of a curation job; configs/demo/curate.yaml is one."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveInt, SerializeAsAny, field_validator

from configs.errors import UsageError
from configs.registry import Config, Tagged, Variant
from curation.balancing import balancers
from curation.captions import DEFAULT_PLACES, CaptionFinder
from curation.filters import filters
from curation.global_rules import global_rules
from curation.scan import DEFAULT_MAX_IMAGE_PIXELS, InputShard
from curation.sources import find_shards
from curation.spans import is_url

Stage = Literal["scan", "decide", "write", "report"]
STAGES: tuple[Stage, ...] = ("scan", "decide", "write", "report")
# A name becomes a folder's name.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class SourceConfig(Config):
    """Some shards that belong together."""

    name: Name
    # A folder, glob or brace pattern, or a list of those; of local files or of any fsspec URL.
    shards: str | tuple[str, ...]
    # Of the URL's file system: endpoint_url, anon, ... Credentials belong into the environment.
    storage_options: dict[str, Any] = Field(default_factory=dict)
    # Share of the dataset relative to the other sources with a weight (global_rules/source_mix.py).
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    # Samples of this source in the dataset at most.
    cap: Annotated[int, Field(ge=0)] | None = None

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns, sorted: their order means nothing."""
        return tuple(sorted({self.shards} if isinstance(self.shards, str) else set(self.shards)))

    @field_validator("shards")
    @classmethod
    def _some(cls, shards: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not shards or (not isinstance(shards, str) and not all(shards)):
            raise ValueError("expected a folder, a glob, a brace pattern, or a list of those")
        return shards


class WriteConfig(Config):
    """How the kept samples are laid out."""

    samples_per_shard: PositiveInt = 10_000
    # Input shards whose samples are shuffled together.
    shards_per_block: PositiveInt = 256
    # global: all samples of a small pool together. One worker then holds the whole index, and
    # every output shard is made from all inputs.
    shuffle: Literal["block", "global"] = "block"

    def block_size(self, num_shards: int) -> int:
        """Return how many input shards make a block."""
        return self.shards_per_block if self.shuffle == "block" else max(1, num_shards)


class EngineConfig(Config):
    """Where the work runs. Changes nothing in the result."""

    num_workers: PositiveInt | None = None  # all CPUs
    address: str | None = None  # RAY_ADDRESS, else one is started here


class CurateConfig(Config):
    """Everything that a curation job needs to know."""

    name: str
    seed: int = 0
    output: str  # the dataset folder to make
    # Beside the tars; a folder where those are read-only. Those of URLs go to the work folder.
    index_dir: str | None = None
    captions: Annotated[tuple[str, ...], Field(min_length=1)] = DEFAULT_PLACES  # captions.py
    sources: Annotated[tuple[SourceConfig, ...], Field(min_length=1)]
    rules: tuple[
        Annotated[SerializeAsAny[Variant], Tagged(filters, global_rules, balancers)], ...
    ] = ()
    write: WriteConfig = WriteConfig()
    stages: tuple[Stage, ...] = STAGES
    engine: EngineConfig = EngineConfig()
    max_image_pixels: PositiveInt = DEFAULT_MAX_IMAGE_PIXELS

    @field_validator("rules")
    @classmethod
    def _balancer_last(cls, rules: tuple[Variant, ...]) -> tuple[Variant, ...]:
        early = [f"rules.{i} ({r.name})" for i, r in enumerate(rules[:-1]) if r.name in balancers]
        if early:
            raise ValueError(
                f"a balancer must be the last rule: it counts what all others have left. "
                f"Move {', '.join(early)} to the end; there can be one only"
            )
        return rules

    @field_validator("captions")
    @classmethod
    def _places(cls, captions: tuple[str, ...]) -> tuple[str, ...]:
        try:
            CaptionFinder(captions)
        except UsageError as error:
            raise ValueError(str(error)) from None
        return captions

    @field_validator("output")
    @classmethod
    def _local(cls, output: str) -> str:
        if is_url(output):
            raise ValueError(
                "a dataset is written to a folder, where files can be renamed into place; "
                "got a URL. Give a local or shared folder and copy it when it is finished"
            )
        return output

    @field_validator("sources")
    @classmethod
    def _unique_names(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        twice = [name for name, n in Counter(source.name for source in sources).items() if n > 1]
        if twice:
            raise ValueError(f"two sources are called {twice[0]!r}; a name must be unique")
        return sources

    @property
    def output_dir(self) -> Path:
        """The dataset folder, absolute: a worker may have another current folder."""
        return Path(os.path.abspath(self.output))

    @property
    def work_dir(self) -> Path:
        """Where decisions and partial results lie, absolute: beside the dataset folder."""
        output = self.output_dir
        return output.with_name(f"{output.name}.work")

    def rule_labels(self) -> list[str]:
        """Return the rules' names in order; a filter that comes again gets a number."""
        seen: Counter[str] = Counter()
        labels = []
        for rule in self.rules:
            seen[rule.name] += 1
            again = seen[rule.name]
            labels.append(rule.name if again == 1 else f"{rule.name}_{again}")
        return labels

    def recipe(self) -> str:
        """Return as YAML what the result depends on: all but where it goes and how it is run."""
        tree = self.model_dump(mode="json", exclude={"output", "index_dir", "stages", "engine"})
        for section, source in zip(tree["sources"], self.sources, strict=True):
            patterns = source.patterns
            del section["storage_options"]  # how the source is reached, not what it is
            section["shards"] = patterns[0] if len(patterns) == 1 else list(patterns)
        tree["sources"].sort(key=lambda section: section["name"])
        return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        """Return the sha256 of the recipe."""
        return hashlib.sha256(self.recipe().encode()).hexdigest()


def find_inputs(config: CurateConfig) -> list[InputShard]:
    """Return the shards of all sources in canonical order: by source name, then path.

    Raises:
        UsageError: a pattern matches nothing, one tar belongs to two sources, or the job wrote it.
    """
    beside = Path(os.path.abspath(config.index_dir)) if config.index_dir else None
    shards: list[InputShard] = []
    owner: dict[str, str] = {}
    for source in sorted(config.sources, key=lambda source: source.name):
        is_remote = any(map(is_url, source.patterns))
        index_dir = config.work_dir / "indexes" if is_remote and beside is None else beside
        options = source.storage_options
        for shard in find_shards(
            source.name, source.patterns, index_dir=index_dir, storage=options
        ):
            if owner.setdefault(shard.path, source.name) != source.name:
                raise UsageError(
                    f"{shard.path} belongs to two sources, {owner[shard.path]!r} and "
                    f"{source.name!r}. A shard can have one only: narrow a pattern."
                )
            shards.append(shard)
    _refuse_own_output(config, shards)
    return shards


def _refuse_own_output(config: CurateConfig, shards: list[InputShard]) -> None:
    """Raise UsageError where a glob or a link leads to what this very job writes."""
    own = [config.output_dir.resolve(), config.work_dir.resolve()]
    folders: dict[Path, Path] = {}  # resolving asks the file system for each folder on the way
    for shard in shards:
        if is_url(shard.path):
            continue
        path = Path(shard.path)
        folder = path.parent
        if folder not in folders:
            folders[folder] = folder.resolve()
        path = path.resolve() if path.is_symlink() else folders[folder]
        if any(path.is_relative_to(other) for other in own):
            raise UsageError(
                f"source {shard.source!r} matches {shard.path}, which lies in {own[0]} or its work "
                "folder: the job would read what it writes. Narrow the pattern, or give another "
                "output."
            )
