"""Tables of named variants (filters, balancers, objectives, ...), each a factory: keywords in, a
part out.

    filters = Registry[Filter]("filter")

    @filters.register("caption_length")
    def caption_length(*, min_words: Annotated[int, Field(ge=0)] = 0) -> Filter:
        ...

In a configuration the variant is a section tagged by its `name`; the keywords of the factory are
the section's keys, validated from their annotations, so that adding a variant is adding one file:

    class CurateConfig(Config):
        rules: tuple[Annotated[Variant, Tagged(filters, balancers)], ...]

    config.rules[0].build()        # calls caption_length(min_words=...)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import (
    CoreSchema,
    ErrorDetails,
    InitErrorDetails,
    PydanticCustomError,
    core_schema,
)

from configs.errors import ConfigError, did_you_mean

Built = TypeVar("Built")
Factory = TypeVar("Factory", bound=Callable[..., Any])


_OUR_ERRORS: dict[str, Any] = {
    "unknown_key": "there is no such key{hint} Known: {known}",
    "required_key": "this key is required",
}


class Config(BaseModel):
    """A section of a configuration: frozen, unknown keys refused with the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="wrap")
    @classmethod
    def _name_known_keys(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            details = [cls._detail(problem) for problem in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(cls.__name__, details) from None

    @classmethod
    def _detail(cls, problem: ErrorDetails) -> InitErrorDetails:
        kind: Any = problem["type"]
        loc, context = problem["loc"], problem.get("ctx", {})
        if kind == "extra_forbidden" and len(loc) == 1:
            known = ", ".join(cls.model_fields)
            kind, context = (
                "unknown_key",
                {"hint": did_you_mean(str(loc[0]), cls.model_fields), "known": known},
            )
        elif kind == "missing":
            kind = "required_key"
        if kind in _OUR_ERRORS:  # pydantic rebuilds its own kinds by name, ours need their template
            kind = PydanticCustomError(kind, _OUR_ERRORS[kind], context)
        return InitErrorDetails(type=kind, loc=loc, input=problem["input"], ctx=context)


class Variant(Config):
    """A section tagged by `name`; its other keys are the keywords of the registered factory."""

    # Keys that every variant of a registry has; they are not the factory's.
    common: ClassVar[frozenset[str]] = frozenset({"name"})

    name: str

    def keywords(self) -> dict[str, Any]:
        """Return the keys of the section that are keywords of the factory, as validated."""
        keys = (key for key in type(self).model_fields if key not in self.common)
        return {key: getattr(self, key) for key in keys}

    def build(self) -> Any:
        """Call the registered factory with the keys of this section."""
        raise NotImplementedError("a variant comes from Registry.section")


class Registry(Generic[Built]):
    """Names to factories of one `kind`. Unknown names raise ConfigError and list the known ones.

    `base` is the section that every variant extends, where they have keys in common.
    """

    def __init__(self, kind: str, base: type[Variant] = Variant) -> None:
        self.kind = kind
        self._base = base
        self._factories: dict[str, Callable[..., Built]] = {}
        self._sections: dict[str, type[Variant]] = {}

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """Register the decorated factory under `name`, which must be new."""

        def add(factory: Factory) -> Factory:
            assert name not in self._factories, f"{self.kind} {name!r} is registered twice"
            self._factories[name] = factory
            return factory

        return add

    def __getitem__(self, name: str) -> Callable[..., Built]:
        if name not in self._factories:
            hint = did_you_mean(name, self._factories)
            raise ConfigError(f"no {self.kind} is called {name!r}{hint} Known: {', '.join(self)}.")
        return self._factories[name]

    def __contains__(self, name: object) -> bool:
        return name in self._factories

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._factories))

    def section(self, name: str) -> type[Variant]:
        """Return the configuration section of one variant, made from its factory's keywords."""
        if name not in self._sections:
            self._sections[name] = _section(name, self[name], self._base)
        return self._sections[name]


def _section(name: str, factory: Callable[..., Any], base: type[Variant]) -> type[Variant]:
    hints = get_type_hints(factory, include_extras=True)
    fields: dict[str, Any] = {"name": (Literal[name], name)}
    for key, parameter in inspect.signature(factory).parameters.items():
        missing = parameter.default is inspect.Parameter.empty
        fields[key] = (hints[key], ... if missing else parameter.default)

    def build(self: Variant) -> Any:
        return factory(**self.keywords())

    section = create_model(name, __base__=base, __doc__=factory.__doc__, **fields)
    section.build = build  # type: ignore[method-assign]
    return section


class Tagged:
    """Annotation of a field that holds one variant of the `registries`, chosen by its `name`."""

    def __init__(self, *registries: Registry[Any]) -> None:
        self.registries = registries

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        choices: dict[Any, CoreSchema] = {
            name: handler.generate_schema(registry.section(name))
            for registry in self.registries
            for name in registry
        }
        return core_schema.tagged_union_schema(choices, discriminator="name")
