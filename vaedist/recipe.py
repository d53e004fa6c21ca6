"""What a run is: the components' own Configs, composed."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vaedist.backend import Config as Train
from vaedist.checkpoint import CheckpointError, Snapshot
from vaedist.checkpoint import Config as Checkpoint
from vaedist.config import Command, as_dict, component, differences, flatten, parse, read
from vaedist.data import Config as Data
from vaedist.debug import Config as Debug
from vaedist.evaluators import Config as Evaluate
from vaedist.optimizer import Config as Optimizer
from vaedist.tracker import Config as Track

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    run: Path = Path()  # the run directory; empty: `default_run`
    seed: int = 0
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
    command = parse(words, RECIPES)
    recipe = read(Recipe, command)
    if recipe.run == Path():
        recipe = replace(recipe, run=default_run(command, recipe))
    return recipe, command.dry_run


# What a resumed run may change: where things lie, how fast they go and when it looks, never what is computed.
_FREE = (
    "run", "data.shards", "data.draw", "data.store", "data.cache", "data.pipe", "data.instead_of",
    "train.steps", "train.accumulate", "train.precision", "train.tf32", "train.compile", "train.timeout",
    "train.engine", "train.zero_stage", "train.offload_", "evaluate.", "checkpoint.", "track.", "debug.",
)  # fmt: skip
# Of these, what nevertheless makes another run of the same recipe unless `run` says otherwise.
_NAMED = ("data.shards", "data.draw", "train.precision", "train.tf32")


def default_run(command: Command, recipe: Recipe) -> Path:
    """runs/NAME and what was overridden, so that the same command, or a longer one, finds the same run again."""
    values, words = flatten(as_dict(recipe)), []
    for word in sorted(command.overrides):
        key = word.partition("=")[0]
        if key.startswith(_NAMED) or not key.startswith(_FREE):
            leaf = key if key in values else f"{key}.name"  # objective=betavae
            words.append(re.sub(r"[^\w.=+-]+", "_", f"{leaf}={values.get(leaf, word)}"))
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
