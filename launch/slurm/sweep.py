"""A sweep is the combinations of what its words list: `objective.gamma=5,10,20 seed=0,1,2` are nine runs."""

import hashlib
import itertools
from collections.abc import Sequence

from vaedist.words import COMMAND_LINE, ConfigError


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
