"""accelerate launch -m vaedist.evaluate RUN [key.path=value ...]    looks at a run's newest checkpoint"""

import json
import sys
from pathlib import Path

from vaedist.backend import Backend
from vaedist.recipe import Recipe
from vaedist.stop import Stop
from vaedist.train import start

# The weights of a checkpoint are whole: no engine that divides them is needed to look at them.
WHOLE = ("train.engine=auto", "train.zero_stage=null", "train.offload_optimizer=null", "train.offload_param=null")


def evaluate(recipe: Recipe, backend: Backend, stop: Stop) -> None:
    """Runs the recipe's evaluators as training does; every rank calls it. Raises one of the trainer's USER_ERRORS.

    Writes RUN/evaluation/step-00001000/: metrics.json and the pictures.
    """
    from shards.files import replacing
    from vaedist import evaluators
    from vaedist.checkpoint import CheckpointError, Checkpoints, averaged
    from vaedist.config import as_dict
    from vaedist.console import Console
    from vaedist.debug import refuse_nonfinite
    from vaedist.environment import environment
    from vaedist.evaluators import Subject
    from vaedist.tracker import open_view, write_pictures
    from vaedist.trainer import on_all_ranks, open_run

    world, console = backend.world, Console(main=backend.main)
    checkpoints = Checkpoints(recipe.run / "checkpoints", recipe.checkpoint.keep, recipe.checkpoint.keep_every)
    data, objective, snapshot = on_all_ranks(world, lambda: open_run(recipe, backend, checkpoints, console))
    if snapshot is None:
        raise CheckpointError(f"{recipe.run}: there is no checkpoint to evaluate; train the run first")
    step = snapshot.progress.step
    objective.load_state_dict(snapshot.weights | averaged(snapshot.moments))
    objective.to(backend.device, backend.dtype)
    numbers, pictures = evaluators.run(Subject(recipe.evaluate, objective, data, world, backend, step))
    refuse_nonfinite(step, numbers)
    if backend.main:
        directory = recipe.run / "evaluation" / f"step-{step:08d}"
        write_pictures(directory, pictures)
        found = {f"eval/{name}": value for name, value in numbers.items()}
        row = {"step": step, "seen": snapshot.progress.seen} | found
        with replacing(directory / "metrics.json") as file:
            file.write(f"{json.dumps(row, indent=1, allow_nan=False)}\n".encode())
        where = environment(step=step, world_size=world.size, device=backend.describe(), data=data.digest)
        if view := open_view(recipe.track, directory, "eval", as_dict(recipe), where, console.say):
            view.replay([row], lambda _: directory)
            view.close(failed=False)
        console.say(f"step {step}  {'  '.join(f'{name} {value:.4g}' for name, value in found.items())}")
        console.say(f"{recipe.run}: evaluated at step {step}; see {directory}")


if __name__ == "__main__":
    if not sys.argv[1:] or "=" in Path(sys.argv[1]).parts[0]:
        sys.exit("usage: accelerate launch -m vaedist.evaluate RUN [key.path=value ...]")
    run, *words = sys.argv[1:]
    keys = {word.partition("=")[0] for word in words}
    whole = [word for word in WHOLE if word.partition("=")[0] not in keys]
    start([f"recipe={run}/recipe.yaml", f"run={run}", *whole, *words], evaluate)
