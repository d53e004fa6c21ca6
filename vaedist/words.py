"""What recipes and the command line say, as text that knows its place; the only file that knows YAML."""

import difflib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

COMMAND_LINE = "command line"
_TEXT = "tag:yaml.org,2002:str"


class ConfigError(Exception):
    """One line for the user: where, which key, which value, and what would be right."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class Node:
    """A value before any type reads it: text, a list or a section."""

    value: "str | list[Node] | dict[str, Node]"
    where: str
    quoted: bool = False

    @property
    def null(self) -> bool:
        return isinstance(self.value, str) and not self.quoted and self.value.lower() in ("none", "null")

    @property
    def blank(self) -> bool:
        return self.value == "" and not self.quoted

    def __str__(self) -> str:
        if isinstance(self.value, dict):
            return f"{{{', '.join(f'{key}: {node}' for key, node in self.value.items())}}}"
        return f"[{', '.join(map(str, self.value))}]" if isinstance(self.value, list) else self.value

    def section(self) -> "dict[str, Node]":
        """Its keys; what is no section is the name of one: `objective: betavae`."""
        return dict(self.value) if isinstance(self.value, dict) else {"name": self}

    def paths(self, section: str = "") -> Iterator[str]:
        """The keys, by their paths, that have a value."""
        if isinstance(self.value, dict):
            for name, node in self.value.items():
                yield from node.paths(join(section, name))
        else:
            yield section

    def wrong(self, key: str, why: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key}={self} {why}")


def join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def nearest(word: str, choices: Collection[str]) -> str:
    """The end of a message about a wrong `word`."""
    near, known = difflib.get_close_matches(word, choices, n=1), ", ".join(choices)
    return f"did you mean {near[0]} (of {known})?" if near else f"choose from {known}"


def is_setting(word: str) -> bool:
    """Whether a word is key.path=value and no run, whose directory may have a `=` in its name: runs/vae,seed=1."""
    return "=" in word.split("/")[0]


# YAML


def from_yaml(text: str | bytes, source: str, key: str = "") -> Node:
    """What `text`, the value of `key`, says; no type is resolved and no object is made."""
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        return _node(root, source, key) if root else Node({}, source)
    except yaml.YAMLError as error:
        where = _place(source, getattr(error, "problem_mark", None))
        raise ConfigError(f"{where}: {key} is not YAML: {getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise ConfigError(f"{source}: {key} contains itself or is nested too deeply") from None


def _node(node: yaml.Node, source: str, key: str) -> Node:
    where = _place(source, node.start_mark)
    if node.tag not in (_TEXT, "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
        raise ConfigError(f"{where}: {key} has the tag {node.tag}; the type of a value is that of its key")
    if isinstance(node, yaml.ScalarNode):
        return Node(node.value, where, quoted=node.style is not None)
    if isinstance(node, yaml.SequenceNode):
        return Node([_node(item, source, f"{key}[{i}]") for i, item in enumerate(node.value)], where)
    section: dict[str, Node] = {}
    for name, value in node.value:
        path, place = join(key, str(name.value)), _place(source, name.start_mark)
        if not isinstance(name, yaml.ScalarNode):
            raise ConfigError(f"{place}: {key} has a key that is not a word")
        if name.value in section:
            raise ConfigError(f"{place}: {path} is given twice")
        section[name.value] = _node(value, source, path)
    return Node(section, where)


def _place(source: str, mark: yaml.Mark | None) -> str:
    return f"{source}:{mark.line + 1}" if mark and source.endswith(".yaml") else source


class _Dumper(yaml.SafeDumper):
    """Quotes what would read back as null, escapes what YAML would fold, and writes floats as Python does."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("none|null", re.IGNORECASE), list("nN"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"-?\d+(\.\d+)?e[-+]\d+"), list("-0123456789"))
_Dumper.add_representer(float, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:float", repr(value)))
_Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar(_TEXT, text, style=None if text.isprintable() else '"')
)


def to_yaml(plain: Mapping[str, Any]) -> str:
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


# The command line


def from_words(words: Iterable[str]) -> Node:
    """What `key.path=value` words say together; their order does not matter and none may contradict another."""
    tree = Node({}, COMMAND_LINE)
    for word in words:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*=.*", word, re.DOTALL):
            raise ConfigError(f"{COMMAND_LINE}: {word} is not of the form key.path=value, such as train.steps=1000")
        key, _, text = word.partition("=")
        flow = text.startswith(("[", "{", "'", '"'))
        node = from_yaml(text, COMMAND_LINE, key) if flow else Node(text, COMMAND_LINE)
        for name in reversed(key.split(".")):
            node = Node({name: node}, COMMAND_LINE)
        tree = _union(tree, node, "")
    return tree


def _union(a: Node, b: Node, key: str) -> Node:
    if not isinstance(a.value, dict) and not isinstance(b.value, dict):
        raise ConfigError(f"{a.where}: {key} is given twice, as {a} and as {b}")
    left, right = a.section(), b.section()
    both = {name: _union(left[name], right[name], join(key, name)) for name in left if name in right}
    return Node({**left, **right, **both}, a.where)


# Recipes


def from_file(path: Path) -> Node:
    """What the recipe at `path` says, without its bases."""
    try:
        document = from_yaml(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if not isinstance(document.value, dict):
        raise ConfigError(f"{document.where}: a recipe is made of lines `key: value`")
    return document


def with_bases(path: Path, recipes: Path, above: tuple[Path, ...] = ()) -> dict[Path, Node]:
    """The recipe at `path`, preceded by those it is based on, each once."""
    said = from_file(path).section()
    bases = said.pop("base", Node([], str(path)))
    layers: dict[Path, Node] = {}
    above = (*above, path.resolve())
    for base in bases.value if isinstance(bases.value, list) else [bases]:
        found = find(str(base), base.where, path.parent, recipes)
        if found.resolve() in above:
            raise base.wrong("base", "makes a circle")
        layers |= with_bases(found, recipes, above)
    return layers | {path.resolve(): Node(said, str(path))}


def find(name: str, where: str, *folders: Path) -> Path:
    """The recipe `name` in the first of `folders` that has it."""
    for folder in folders:
        path = folder / (name if name.endswith(".yaml") else f"{name}.yaml")
        if path.is_file():
            return path
    raise ConfigError(f"{where}: there is no recipe {name}; {nearest(name, names(folders[-1]))}")


def names(recipes: Path) -> list[str]:
    return sorted(path.stem for path in recipes.glob("*.yaml"))
