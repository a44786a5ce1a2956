"""The rules of a job as they travel to workers, and how they fall into phases.

A phase is a run of filters with the global rule that ends it; the last phase has none. Each phase
is one pass over the shards, each global rule one barrier between two of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curation.balancing import balancers
from curation.filters import filters
from curation.global_rules import global_rules
from curation.global_rules.source_mix import SOURCES, SourceMix
from curation.work import digest_of

if TYPE_CHECKING:  # a worker does not need it, and it takes long to import
    from curation.config import CurateConfig

VERSION = 2


@dataclass(frozen=True)
class Rule:
    """One rule: JSON that a worker builds it from, and digests of what its result depends on."""

    label: str
    section: str  # with absolute paths, for workers with another current folder
    is_global: bool
    is_balancer: bool
    # Of a filter: configuration and content of its files. Of a global rule: what `emit` depends on.
    digest: str
    # Of a global rule: what `solve` and `apply` depend on.
    solve_digest: str = ""

    def build(self) -> Any:
        """Return the filter or global rule; once a process."""
        return _build(self.section, self.digest, self.solve_digest)


@dataclass(frozen=True)
class Phase:
    """Filters, and the global rule that comes after them."""

    filters: tuple[Rule, ...]
    ends_with: Rule | None

    @property
    def digest(self) -> str:
        """Digest of what its pass over a shard depends on, beyond the shard."""
        last = self.ends_with and (self.ends_with.label, self.ends_with.digest)
        return digest_of(VERSION, [(rule.label, rule.digest) for rule in self.filters], last)


@dataclass(frozen=True)
class Rules:
    """The rules of a job, in order."""

    rules: tuple[Rule, ...]

    @classmethod
    def of(cls, config: CurateConfig) -> Rules:
        """Return the rules of a configuration.

        Raises:
            PairmillError: a rule names a file that is not there or not what it should be.
        """
        rules = [
            _rule(label, section)
            for label, section in zip(config.rule_labels(), config.rules, strict=True)
        ]
        mix = {source.name: (source.weight, source.cap) for source in config.sources}
        if any(value is not None for pair in mix.values() for value in pair):
            section = json.dumps({"name": SOURCES, "sources": mix}, sort_keys=True)
            built = _build(section, "", "")
            rules.append(Rule(SOURCES, section, True, False, built.emit_digest, built.solve_digest))
        return cls(tuple(rules))

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases, in order; the last one ends with no global rule."""
        return tuple(self._phases())

    def _phases(self) -> Iterator[Phase]:
        local: list[Rule] = []
        for rule in self.rules:
            if rule.is_global:
                yield Phase(tuple(local), rule)
                local = []
            else:
                local.append(rule)
        yield Phase(tuple(local), None)

    @property
    def balancer(self) -> Rule | None:
        """The balancer, if there is one."""
        return next((rule for rule in self.rules if rule.is_balancer), None)

    @property
    def labels(self) -> list[str]:
        """Names of the rules in order, as they stand in reasons."""
        return [rule.label for rule in self.rules]

    @property
    def vectors(self) -> tuple[str, ...]:
        """Names of the vectors that the rules use (vectors.py)."""
        names = {name for r in self.rules for name in getattr(r.build(), "vectors", ())}
        return tuple(sorted(names))

    @property
    def digest(self) -> str:
        """Digest of all that the decisions depend on, beyond indexes, vectors and seed."""
        return digest_of(VERSION, [(r.label, r.digest, r.solve_digest) for r in self.rules])


def _rule(label: str, section: Any) -> Rule:
    tree = section.model_dump(mode="json")
    placed = {
        key: os.path.abspath(v) if isinstance(getattr(section, key), Path) else v
        for key, v in tree.items()
    }
    built = _make(placed)
    is_balancer = section.name in balancers
    is_global = is_balancer or section.name in global_rules
    if is_global:
        digests = (built.emit_digest, digest_of(tree, built.solve_digest))
    else:
        # A filter whose judgement depends on a file says so by an attribute.
        digests = (digest_of(tree, getattr(built, "digest", "")), "")
    return Rule(label, json.dumps(placed), is_global, is_balancer, *digests)


# The digests are keys only: they notice a file that changed behind the same configuration.
@lru_cache(maxsize=64)
def _build(section: str, digest: str, solve_digest: str) -> Any:
    return _make(json.loads(section))


def _make(tree: dict[str, Any]) -> Any:
    if tree["name"] == SOURCES:
        return SourceMix(tree["sources"])
    registry: Any = next(r for r in (balancers, global_rules, filters) if tree["name"] in r)
    return registry.section(tree["name"]).model_validate(tree).build()
