"""A sweep is the combinations of what its words list: `objective.gamma=5,10,20 seed=0,1,2` are nine runs."""

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

from vaedist.words import COMMAND_LINE, ConfigError, from_file


def written(sweep: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words that all runs of a sweep share, and those that list; as given, or of a file for `wandb sweep`.

    Words after the file are shared, and go before what it shares. Raises ConfigError where the file is not of a grid.
    """
    if not sweep or "=" in sweep[0]:
        return [], list(sweep)
    file = from_file(Path(sweep[0])).section()
    if "method" not in file or str(file["method"]) != "grid":
        raise ConfigError(
            f"{sweep[0]}: only `method: grid` can be submitted; for others use `wandb sweep` and an agent"
        )
    if "parameters" not in file or not isinstance(file["parameters"].value, dict):
        raise ConfigError(f"{sweep[0]}: there are no parameters")
    shared, lists = [], []
    for key, node in file["parameters"].section().items():
        axis = node.section()
        if axis.keys() == {"value"}:
            shared.append(f"{key}={axis['value']}")
        elif axis.keys() == {"values"} and isinstance(axis["values"].value, list):
            lists.append(f"{key}={','.join(map(str, axis['values'].value))}")
        else:
            raise node.wrong(f"parameters.{key}", "is neither `value: A` nor `values: [A, B]`, which a grid is made of")
    return [*shared, *sweep[1:]], lists


def combinations(sweep: Sequence[str]) -> list[list[str]]:
    """The words of each run, the last one's values changing fastest. Raises ConfigError."""
    choices = []
    for word in sweep:
        key, equals, values = word.partition("=")
        if not equals or not all(alternatives := split(values)):
            raise ConfigError(f"{COMMAND_LINE}: --sweep {word} is not of the form key.path=value,value,...")
        choices.append([f"{key}={value}" for value in alternatives])
    return [list(chosen) for chosen in itertools.product(*choices)]


def split(values: str) -> list[str]:
    """At the commas that are in no brackets and no quotes."""
    found, depth, quote = [""], 0, ""
    for character in values:
        if character == "," and not depth and not quote:
            found.append("")
            continue
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(character, 0) if not quote else 0
        found[-1] += character
    return found


def group(words: Sequence[str], sweep: Sequence[str]) -> str:
    """What the runs of a sweep are called together, in W&B and for SLURM."""
    recipe = next((word.partition("=")[2] for word in words if word.startswith("recipe=")), "sweep")
    name = " ".join([recipe, *sweep])
    return name if len(name) <= 100 else f"{name[:80]} {hashlib.sha256(name.encode()).hexdigest()[:12]}"
