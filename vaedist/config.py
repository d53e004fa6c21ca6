"""Reads recipes and `key.path=value` words into frozen dataclasses and writes them back; knows no component.

A value stays text until the type of its field reads it, so `1e-4` is a float and `no` is a string. The last word wins:
dataclass default < `base` recipes < recipe < command line. Whatever is wrong is a ConfigError of one line.
"""

import dataclasses
import importlib
import itertools
import math
import operator
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from vaedist import words
from vaedist.words import COMMAND_LINE, Node, join, nearest
from vaedist.words import ConfigError as ConfigError  # most modules know it from here

T = TypeVar("T")

_LIMITS: dict[str, Callable[[Any, Any], bool]] = {
    "above": operator.gt,
    "at least": operator.ge,
    "at most": operator.le,
    "below": operator.lt,
}


# Fields


def bounded(
    default: Any = MISSING,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field whose number, or every number of its tuple, lies within these limits; None passes."""
    limits = {"above": above, "at least": at_least, "at most": at_most, "below": below}
    return dataclasses.field(default=default, metadata={"limits": {k: v for k, v in limits.items() if v is not None}})


def component(package: str, *, default: str | None = None) -> Any:
    """A field whose section names a file of `package`; the `Config` in that file reads the section's other keys.

    A recipe may write `objective: betavae` for a section that is only `name: betavae`.
    """
    kind = _Component(package, default)
    factory: Any = MISSING if default is None else lambda: kind.schema(default)()
    return dataclasses.field(default_factory=factory, metadata={"component": kind})


def component_name(config: Any) -> str:
    """The name a component's Config has in a recipe: its file's."""
    return type(config).__module__.rpartition(".")[2]


def available(package: str) -> list[str]:
    """The names of the components in `package`: its files, but those that start with an underscore."""
    modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(module.name for module in modules if not module.name.startswith("_"))


@dataclass(frozen=True)
class _Component:
    package: str
    default: str | None

    def schema(self, name: str) -> Any:
        return importlib.import_module(f"{self.package}.{name}").Config


# Words in, dataclasses out


@dataclass(frozen=True, kw_only=True)
class Command:
    """The words of a command line, sorted by what they are for."""

    recipe: Path
    recipes: Path  # the folder where recipes are found by name
    overrides: tuple[str, ...]
    dry_run: bool

    @property
    def name(self) -> str:
        return self.recipe.stem


@dataclass(frozen=True, kw_only=True)
class _Own:
    recipe: str | None = None
    dry_run: bool = False


_OWN = {field.name for field in dataclasses.fields(_Own)}


def parse(arguments: Sequence[str], recipes: Path) -> Command:
    """Sorts `recipe=NAME_OR_PATH [dry_run=true] [key.path=value ...]`. Raises ConfigError."""
    said = words.from_words(arguments).section()
    own: _Own = _section(_Own, [Node({key: said[key] for key in _OWN & said.keys()}, COMMAND_LINE)], "", None)
    if own.recipe is None:
        raise ConfigError(f"{COMMAND_LINE}: recipe=NAME is missing; {nearest('', words.names(recipes))}")
    beside = Path() if own.recipe.endswith(".yaml") else recipes
    return Command(
        recipe=words.find(own.recipe, COMMAND_LINE, beside, recipes),
        recipes=recipes,
        overrides=tuple(word for word in arguments if word.partition("=")[0] not in _OWN),
        dry_run=own.dry_run,
    )


@dataclass(frozen=True)
class Replica:
    """One of several runs that the same words describe: where they give a list for a number or path, its part."""

    number: int
    count: int | None = None  # of all; null: not known yet
    lists: set[str] = dataclasses.field(default_factory=set)  # the keys that gave one

    def part(self, node: Node, key: str) -> Node:
        """Raises ConfigError where the list has not one value for each."""
        assert isinstance(node.value, list)
        if not node.value or self.count not in (None, len(node.value)):
            many = f"train.replicas={self.count}" if self.count else "one replica at least"
            raise node.wrong(key, f"has {len(node.value)} values for {many}")
        self.lists.add(key)
        return node.value[self.number]


def keys_said(command: Command) -> list[str]:
    """The keys to which the words give a value, sorted as the words that give each its own are."""
    order = {}
    for word in command.overrides:
        for key in words.from_words([word]).paths():
            own = word.startswith(f"{key}=")  # in a section, `name` is what `objective=betavae` gives
            order[key] = f"{key if own else key.removesuffix('.name')}="
    return sorted(order, key=order.__getitem__)


def read(schema: type[T], command: Command, replica: Replica | None = None) -> T:
    """The `schema` that the command's recipe, its bases and its overrides describe. Raises ConfigError."""
    layers = [Node({}, str(command.recipe)), *words.with_bases(command.recipe, command.recipes).values()]
    if command.overrides:
        layers.append(words.from_words(command.overrides))
    config: T = _section(schema, layers, "", replica)
    return config


def _section(schema: Any, layers: list[Node], key: str, replica: Replica | None) -> Any:
    """The dataclass that `layers` describe, weakest first, at least one."""
    fields = {field.name: field for field in dataclasses.fields(schema)}
    said: dict[str, list[Node]] = {name: [] for name in fields}
    for layer in layers:
        if not isinstance(layer.value, dict):
            raise layer.wrong(key, f"is not a section; its keys are {', '.join(fields)}")
        for name, node in layer.value.items():
            if name not in fields:
                raise node.wrong(join(key, name), f"is not a key of {key or 'a recipe'}; {nearest(name, fields)}")
            said[name].append(node)
    hints = typing.get_type_hints(schema)
    values = {}
    for name, field in fields.items():
        path, nodes = join(key, name), said[name]
        kind = field.metadata.get("component", hints[name])
        if isinstance(kind, _Component) or is_dataclass(kind):
            nodes = [_unsaid(field, layers[0].where), *nodes]
        if nodes:
            values[name] = _value(kind, nodes, path, replica)
            _check(field.metadata.get("limits", {}), values[name], nodes[-1], path)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{layers[0].where}: {path} is missing; write it there or say {path}=VALUE")
    try:
        return schema(**values)
    except ValueError as error:  # of its __post_init__
        raise ConfigError(f"{layers[-1].where}: {key + ': ' if key else ''}{error}") from None


def _unsaid(field: dataclasses.Field[Any], where: str) -> Node:
    """What a section holds before anything is said about it."""
    if "component" in field.metadata or field.default is field.default_factory:  # both MISSING
        return Node({}, where)
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return words.from_yaml(dump(default), where, field.name)


def _check(limits: Mapping[str, float], value: Any, node: Node, key: str) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if number is not None and not all(_LIMITS[word](number, limit) for word, limit in limits.items()):
            allowed = " and ".join(f"{word} {limit}" for word, limit in limits.items())
            raise node.wrong(key, f"is out of range: it must be {allowed}")


def _value(kind: Any, layers: list[Node], key: str, replica: Replica | None) -> Any:
    top, arguments = layers[-1], typing.get_args(kind)
    if top.blank:
        raise ConfigError(f"{top.where}: {key} has no value; write one, or null, or ''")
    if isinstance(kind, _Component):
        return _chosen(kind, layers, key, replica)
    if is_dataclass(kind):
        return _section(kind, layers, key, replica)
    if typing.get_origin(kind) in (types.UnionType, Union):  # T | None
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        since_null = list(itertools.takewhile(lambda node: not node.null, reversed(layers)))
        return _value(inner, since_null[::-1], key, replica) if since_null else None
    if typing.get_origin(kind) is tuple:
        return _tuple(arguments, top, key)
    if typing.get_origin(kind) is Literal:
        choices = {str(choice): choice for choice in arguments}
        if str(top) not in choices:
            raise top.wrong(key, f"is no choice; {nearest(str(top), choices)}")
        return choices[str(top)]
    if replica and isinstance(top.value, list) and kind in (int, float, Path):
        return _value(kind, [replica.part(top, key)], key, None)
    read_text, name = _LEAVES[kind]
    try:
        if isinstance(top.value, str):
            return read_text(top.value)
    except ValueError:
        pass
    raise top.wrong(key, f"is not {name}")


def _chosen(kind: _Component, layers: list[Node], key: str, replica: Replica | None) -> Any:
    """The Config of the component named last; what was said before the name changed was about another one."""
    name, kept = kind.default, layers[:0]
    for layer in layers:
        section = layer.section()
        named = section.pop("name", None)
        if named and str(named) != name:
            known = available(kind.package)
            if str(named) not in known:
                raise named.wrong(f"{key}.name", f"is not in {kind.package}; {nearest(str(named), known)}")
            name, kept = str(named), kept if name is None else []
        kept.append(Node(section, layer.where))
    if name is None:
        raise ConfigError(f"{layers[0].where}: {key}.name is missing; {nearest('', available(kind.package))}")
    return _section(kind.schema(name), kept, key, replica)


def _tuple(kinds: tuple[Any, ...], node: Node, key: str) -> tuple[Any, ...]:
    if not isinstance(node.value, list):
        raise node.wrong(key, f"is not a list; write [{node}]")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(node.value)
    if len(kinds) != len(node.value):
        raise node.wrong(key, f"must have {len(kinds)} values")
    return tuple(_value(kinds[i], [item], f"{key}[{i}]", None) for i, item in enumerate(node.value))


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer() or abs(number) > 2**53:  # beyond, 1e23 is not the integer it looks like
            raise
        return int(number)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError
    return number


_LEAVES: dict[Any, tuple[Callable[[str], Any], str]] = {
    bool: (
        lambda text: bool(("false", "true").index(text.lower())),
        "true or false",
    ),  # True is what `wandb agent` says
    int: (_integer, "an int"),
    float: (_finite, "a finite number"),
    str: (str, "text"),
    Path: (Path, "a path"),
}


# Dataclasses in, text out


def as_dict(config: Any) -> dict[str, Any]:
    """The config as nested plain dicts, a component's `name` first; lists for tuples, text for paths."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain[field.name] = _plain(value)
        if "component" in field.metadata:
            plain[field.name] = {"name": component_name(value), **plain[field.name]}
    return plain


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return as_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def dump(config: Any) -> str:
    """The config as a recipe that reads back to an equal one."""
    return words.to_yaml(as_dict(config))


def leaves(config: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    """`key.path -> value` of nested dicts such as `as_dict` gives."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        key = join(section, name)
        flat |= leaves(value, key) if isinstance(value, Mapping) else {key: value}
    return flat


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """The same with every value as a recipe writes it."""
    return {key: _text(value) for key, value in leaves(config).items()}


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """`key.path -> (value in a, value in b)` where two such nested dicts differ; `absent` where one has no such key."""
    left, right = flatten(a), flatten(b)
    pairs = {key: (left.get(key, "absent"), right.get(key, "absent")) for key in left | right}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
