"""What a run is: the components' own Configs, composed."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vaedist.backend import Config as Train
from vaedist.checkpoint import CheckpointError, Snapshot
from vaedist.checkpoint import Config as Checkpoint
from vaedist.config import (
    Command,
    ConfigError,
    Replica,
    as_dict,
    bounded,
    component,
    differences,
    flatten,
    keys_said,
    leaves,
    parse,
    read,
)
from vaedist.data import Config as Data
from vaedist.debug import Config as Debug
from vaedist.evaluators import Config as Evaluate
from vaedist.optimizer import Config as Optimizer
from vaedist.tracker import Config as Track
from vaedist.words import COMMAND_LINE

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    run: Path = Path()  # the run directory; empty: `default_run`
    seed: int = bounded(0, at_least=-(2**63), at_most=2**63 - 2**20)  # int64, also of the last replica
    data: Data = field(default_factory=Data)
    model: Any = component("vaedist.models", default="conv64")
    objective: Any = component("vaedist.objectives", default="vae")
    optimizer: Optimizer = field(default_factory=Optimizer)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    track: Track = field(default_factory=Track)
    debug: Debug = field(default_factory=Debug)

    def __post_init__(self) -> None:
        if self.debug.anomaly and self.train.compile:
            raise ValueError(
                "debug.anomaly=true looks for an operation, train.compile=true fuses them: say one of both"
            )
        if self.evaluate.attributes and self.data.window is not None:
            raise ValueError(
                "evaluate.attributes shows directions, means over all training images, of which a run with data.window "
                "has few at one time: leave it out"
            )


def load(words: Sequence[str]) -> tuple[Recipe, bool]:
    """The recipe that the words of a command line describe, and whether they only ask to see it (dry_run=true)."""
    (recipe, *others), dry_run = load_all(words)
    if others:
        raise ConfigError(f"{COMMAND_LINE}: train.replicas={1 + len(others)} is for training; this is about one run")
    return recipe, dry_run


def load_all(words: Sequence[str]) -> tuple[list[Recipe], bool]:
    """The same of every one of train.replicas runs: as the words for it alone would describe it.

    Replica k has the k-th value of what the words give as a list, and the seed + k unless they list the seeds.
    """
    command = parse(words, RECIPES)
    first = read(Recipe, command, begun := Replica(0))
    count = first.train.replicas
    if "train.replicas" in begun.lists:
        raise ConfigError(f"{COMMAND_LINE}: train.replicas is a list: say how many, and of what differs a list")
    if count == 1:
        recipe = read(Recipe, command) if begun.lists else first  # which refuses them
        return [named(command, recipe)], command.dry_run
    recipes = []
    for number in range(count):
        recipe = read(Recipe, command, replica := Replica(number, count))
        seed = recipe.seed if "seed" in replica.lists else recipe.seed + number
        recipe = replace(recipe, seed=seed, train=replace(recipe.train, replicas=1))
        unseeded = [word for word in command.overrides if not word.startswith("seed=")]
        recipes.append(named(replace(command, overrides=(*unseeded, f"seed={seed}")), recipe))
    _refuse_unlike(recipes)
    return recipes, command.dry_run


def named(command: Command, recipe: Recipe) -> Recipe:
    """The recipe with a run directory."""
    if recipe.run != Path():
        return recipe
    return replace(recipe, run=Path.cwd() if "run" in keys_said(command) else default_run(command, recipe))  # run=.


def _refuse_unlike(recipes: Sequence[Recipe]) -> None:
    """Raises ConfigError where replicas differ in what one process cannot do at once, or not at all."""
    first, runs = as_dict(recipes[0]), Counter(recipe.run for recipe in recipes)
    for recipe in recipes[1:]:
        for key, (one, other) in differences(first, as_dict(recipe)).items():
            number = key.startswith(("objective.", "optimizer.")) and isinstance(leaves(first)[key], float)
            if key not in ("run", "seed") and not number:
                raise ConfigError(
                    f"{COMMAND_LINE}: {key} is {one} and {other}: replicas may differ in the seed and in numbers of "
                    "objective and optimizer that need not be whole"
                )
    run, several = runs.most_common(1)[0]
    if several > 1:
        raise ConfigError(
            f"{run}: {several} replicas would write there; give each another seed, or say run=[A,B,...] for all"
        )


# What a resumed run may change: where things lie, how fast they go and when it looks, never what is computed.
_FREE = (
    "run", "data.shards", "data.draw", "data.store", "data.cache", "data.pipe", "data.instead_of",
    "train.steps", "train.accumulate", "train.replicas", "train.precision", "train.tf32", "train.capture",
    "train.compile", "train.timeout", "train.engine", "train.zero_stage", "train.offload_",
    "evaluate.", "checkpoint.", "track.", "debug.",
)  # fmt: skip
# Of these, what nevertheless makes another run of the same recipe unless `run` says otherwise.
_NAMED = ("data.shards", "data.draw", "train.precision", "train.tf32")


def default_run(command: Command, recipe: Recipe) -> Path:
    """runs/NAME and what was overridden, so that the same command, or a longer one, finds the same run again."""
    values, words = flatten(as_dict(recipe)), []
    for key in keys_said(command):
        if key.startswith(_NAMED) or not key.startswith(_FREE):
            leaf = key if key in values else f"{key}.name"  # objective=betavae
            words.append(re.sub(r"[^\w.=+-]+", "_", f"{leaf}={values[leaf]}"))
    name = ",".join([command.name, *words])
    if len(name) > 120:
        name = f"{name[:100]},{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return Path("runs") / name


def refuse_other_run(snapshot: Snapshot, recipe: Recipe, digest: str) -> None:
    """Raises CheckpointError when the checkpoint is of a run that computes something else."""
    if snapshot.data != digest and not snapshot.data.startswith(recipe.data.instead_of or "none"):
        raise CheckpointError(
            f"{snapshot.path}: this run was started on the data set {snapshot.data[:12]}, {recipe.data.shards} is "
            f"{digest[:12]}: say run=ANOTHER_DIRECTORY to start a new one, or data.instead_of={snapshot.data[:12]} to "
            "go on with this set knowingly"
        )
    changed = {}
    for key, (before, now) in differences(snapshot.recipe, as_dict(recipe)).items():
        if not key.startswith(_FREE) and before != "absent":  # absent: an option younger than the checkpoint
            changed[key] = (before, now)
    if changed:
        key, (before, now) = next(iter(changed.items()))
        raise CheckpointError(
            f"{snapshot.path}: this run was started with {key}={before}, now it is {now}: "
            "say run=ANOTHER_DIRECTORY to start a new one"
        )
