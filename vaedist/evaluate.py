"""[accelerate launch -m | python -m] vaedist.evaluate RUN [key.path=value ...]    looks at a run's newest checkpoint"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vaedist.backend import Backend
from vaedist.evaluators import SETTINGS
from vaedist.recipe import Recipe
from vaedist.stop import Stop
from vaedist.train import start
from vaedist.words import is_setting

if TYPE_CHECKING:
    from vaedist.console import Console
    from vaedist.evaluators import Subject
    from vaedist.train import Work

# The weights of a checkpoint are whole: no engine that divides them is needed to look at them.
WHOLE = ("train.engine=auto", "train.zero_stage=null", "train.offload_optimizer=null", "train.offload_param=null")


def observed(recipe: Recipe, backend: Backend, console: "Console") -> tuple["Subject", int]:
    """The run after its newest checkpoint, and how many images it had seen; every rank calls it. Raises as `train`."""
    from vaedist.checkpoint import CheckpointError, Checkpoints, averaged
    from vaedist.evaluators import Subject
    from vaedist.trainer import on_all_ranks, open_run

    world = backend.world
    checkpoints = Checkpoints(recipe.run / "checkpoints", recipe.checkpoint.keep, recipe.checkpoint.keep_every)
    data, objective, snapshot = on_all_ranks(world, lambda: open_run(recipe, backend, checkpoints, console))
    if snapshot is None:
        raise CheckpointError(f"{recipe.run}: there is no checkpoint to evaluate; train the run first")
    objective.load_state_dict(snapshot.weights | averaged(snapshot.moments))
    objective.to(backend.device, backend.dtype).eval()
    progress = snapshot.progress
    return Subject(recipe.evaluate, objective, data, world, backend, progress.step), progress.seen


def evaluate(recipe: Recipe, backend: Backend, stop: Stop) -> None:
    """Runs the recipe's evaluators as training does; every rank calls it. Raises one of the trainer's USER_ERRORS.

    Writes RUN/evaluation/step-00001000/, metrics.json and the pictures, and RUN/curves.png.
    """
    from shards.files import replacing
    from vaedist import curves, evaluators, rows
    from vaedist.config import as_dict
    from vaedist.console import Console
    from vaedist.debug import refuse_nonfinite
    from vaedist.environment import environment
    from vaedist.pictures import write_pictures
    from vaedist.tracker import open_view

    console = Console(main=backend.main)
    subject, seen = observed(recipe, backend, console)
    numbers, pictures = evaluators.run(subject)
    refuse_nonfinite(subject.step, numbers)
    if backend.main:
        directory = recipe.run / "evaluation" / f"step-{subject.step:08d}"
        write_pictures(directory, pictures)
        found = {f"eval/{name}": value for name, value in numbers.items()}
        row = {"step": subject.step, "seen": seen} | found
        known = directory / "metrics.json"
        before = rows.parsed(known.read_bytes(), str(known)) if known.exists() else {}  # what other evaluators found
        with replacing(known) as file:
            file.write(f"{json.dumps(before | row, indent=1, allow_nan=False)}\n".encode())
        where = environment(
            step=subject.step, world_size=backend.world.size, device=backend.describe(), data=subject.data.digest
        )
        if view := open_view(recipe.track, directory, "eval", as_dict(recipe), where, console.say):
            view.replay([row], lambda _: directory)
            view.close(failed=False)
        if (recipe.run / "metrics.jsonl").exists():
            curves.write(recipe.run)
        console.say(f"step {subject.step}  {'  '.join(f'{name} {value:.4g}' for name, value in found.items())}")
        console.say(f"{recipe.run}: evaluated at step {subject.step}; see {directory}")


def start_on(run: str, words: Sequence[str], work: "Work") -> None:
    """The program that does `work` on a run, whose recipe the words change."""
    start(recipe_of(run, words), work)


def recipe_of(run: str, words: Sequence[str]) -> list[str]:
    """The words that describe it."""
    said = dict(word.partition("=")[::2] for word in words)
    names = said.get("evaluate.names")
    unset = [] if names is None else [f"{key}=null" for key, name in SETTINGS.items() if name not in names]
    kept = [word for word in (*WHOLE, *unset) if word.partition("=")[0] not in said]
    return [f"recipe={Path(run)}/recipe.yaml", f"run={Path(run)}", *kept, *words]


if __name__ == "__main__":
    if not sys.argv[1:] or is_setting(sys.argv[1]):
        sys.exit("usage: accelerate launch -m vaedist.evaluate RUN [key.path=value ...]")
    start_on(sys.argv[1], sys.argv[2:], evaluate)
