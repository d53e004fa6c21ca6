"""A run as its directory tells it: recipe, numbers, pictures, and how far it is."""

import glob
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vaedist import rows
from vaedist.config import ConfigError, flatten
from vaedist.pictures import FORMATS
from vaedist.rows import Row
from vaedist.words import Node, from_file


class Point(NamedTuple):
    step: int
    seen: int
    value: float


class Picture(NamedTuple):
    kind: str  # one of FORMATS
    read: Callable[[], bytes]


Curve = list[Point]  # by step, each once


@dataclass(frozen=True)
class Run:
    name: str  # as the user called it
    recipe: dict[str, str]  # key.path -> value
    data: str  # the digest of the set; without one the place of the set
    step: int  # of the last row, 0 before the first
    curves: dict[str, Curve]  # by metric
    pictures: dict[str, dict[int, Picture]] = field(default_factory=dict)  # by name and step
    path: str = ""  # entity/project/id on W&B; empty where the directory does not tell

    @property
    def seed(self) -> str:
        return self.recipe.get("seed", "?")

    @property
    def steps(self) -> int:
        """How many the recipe asks for."""
        return int(self.recipe["train.steps"])

    @property
    def complete(self) -> bool:
        return self.step >= self.steps


def expand(word: str) -> list[Path]:
    """The directories that a word of the command line means: itself, or the runs among what the glob matches."""
    if Path(word).exists() or not glob.has_magic(word):
        return [Path(word)]
    found = map(Path, glob.glob(word))  # noqa: PTH207  Path.glob has no absolute patterns
    return sorted(path for path in found if (path / "recipe.yaml").exists())


def read(directory: Path) -> Run:
    """The run in `directory`, also while it is written. Raises ConfigError where there is none or it is damaged."""
    if not (directory / "recipe.yaml").is_file():
        raise ConfigError(f"{directory}: is no run: there is no recipe.yaml in it")
    recipe = canonical(_plain(from_file(directory / "recipe.yaml")))
    if not recipe.get("train.steps", "").isdecimal():
        raise ConfigError(f"{directory / 'recipe.yaml'}: train.steps is no number")
    known = [
        *_rows(directory / "metrics.jsonl"),
        *map(_evaluation, _in_steps(directory / "evaluation", "metrics.json")),
    ]
    return Run(
        name=str(directory),
        recipe=recipe,
        data=_digest(directory / "environment.json") or recipe.get("data.shards", ""),
        step=max((row["step"] for row in known), default=0),
        curves=curves(known),
        pictures=_pictures(directory),
        path=_path(directory, recipe),
    )


def canonical(recipe: Mapping[str, Any]) -> dict[str, str]:
    """`key.path -> value` with one text for each number, whether YAML or JSON has kept it: 4 for 4.0."""
    return {key: _number(value) for key, value in flatten(recipe).items()}


def curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, Curve]:
    """The numbers of rows by metric; of the same step the later row's."""
    found: dict[str, dict[int, Point]] = {}
    for row in rows:
        for name, value in row.items():
            if "/" in name and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, {})[row["step"]] = Point(row["step"], row["seen"], float(value))
    return {name: [points[step] for step in sorted(points)] for name, points in found.items()}


def _plain(node: Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _plain(value) for key, value in node.value.items()}
    return [_plain(item) for item in node.value] if isinstance(node.value, list) else node.value


def _number(text: str) -> str:
    if text.startswith("[") and text.endswith("]"):
        return f"[{', '.join(map(_number, text[1:-1].split(', ')))}]"
    try:
        return repr(int(text) if text.lstrip("-").isdecimal() else float(text)).removesuffix(".0")
    except ValueError:
        return text


def _rows(path: Path) -> list[Row]:
    try:
        return rows.read(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: the run is damaged") from None


def _evaluation(path: Path) -> Row:
    return rows.parsed(path.read_bytes(), str(path))


def _in_steps(directory: Path, pattern: str) -> list[Path]:
    found = directory.glob(f"step-[0-9]*/{pattern}")
    return sorted(path for path in found if path.parent.name.removeprefix("step-").isdecimal())


def _digest(path: Path) -> str:
    """The data set of the last start."""
    try:
        return str(json.loads(path.read_bytes())[-1]["data"]) if path.exists() else ""
    except (ValueError, KeyError, TypeError, IndexError):
        raise ConfigError(f"{path}: is not a list of starts: the run is damaged") from None


def _pictures(directory: Path) -> dict[str, dict[int, Picture]]:
    found: dict[str, dict[int, Picture]] = {}
    for place in ("pictures", "evaluation"):  # a later look replaces an earlier one
        for path in _in_steps(directory / place, "*"):
            kind, step = path.suffix[1:], int(path.parent.name.removeprefix("step-"))
            if kind in FORMATS and not path.name.startswith("."):
                found.setdefault(path.stem, {})[step] = Picture(kind, path.read_bytes)
    return found


def _path(directory: Path, recipe: Mapping[str, str]) -> str:
    identity = directory / "wandb" / "id"
    if not identity.exists():
        return ""
    entity = recipe.get("track.entity", "null")
    project = recipe.get("track.project", "")
    return f"{'' if entity == 'null' else entity}/{project}/{identity.read_text()}" if project else ""
