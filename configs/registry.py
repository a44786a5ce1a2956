"""A table of named variants (filters, balancers, objectives, ...): a plain dict with good errors.

    filters = Registry[FilterFactory]("filter")

    @filters.register("caption_length")
    def caption_length(...): ...

    filters["caption_length"]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from configs.errors import ConfigError, did_you_mean

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to variants of one `kind`. Unknown names raise ConfigError and list the known ones."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._variants: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Register the decorated variant under `name`, which must be new."""

        def add(variant: T) -> T:
            assert name not in self._variants, f"{self.kind} {name!r} is registered twice"
            self._variants[name] = variant
            return variant

        return add

    def __getitem__(self, name: str) -> T:
        try:
            return self._variants[name]
        except KeyError:
            known = ", ".join(sorted(self._variants))
            hint = did_you_mean(name, self._variants)
            raise ConfigError(f"no {self.kind} is called {name!r}{hint} Known: {known}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._variants

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._variants))
