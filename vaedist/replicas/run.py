"""Several runs from their recipes to their last checkpoints: what `trainer.train` does for one before its loop."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import isqrt
from typing import Any

import torch

from vaedist import evaluators
from vaedist.aggregate import CHUNK
from vaedist.backend import load_weights
from vaedist.checkpoint import Checkpoints, Progress, Snapshot, Writer
from vaedist.config import ConfigError
from vaedist.console import Console
from vaedist.data import Dataset
from vaedist.data.stream import Batch, Stream
from vaedist.debug import DivergedError
from vaedist.meters import Meters
from vaedist.noise import fork
from vaedist.objectives import Objective
from vaedist.recipe import Recipe, refuse_other_run
from vaedist.replicas.backend import ReplicaBackend
from vaedist.replicas.files import Trackers, merged, newest_common, save_all
from vaedist.replicas.objective import ReplicaNoise, Replicas
from vaedist.session import Session
from vaedist.stop import Stop
from vaedist.tracker import refuse_second
from vaedist.trainer import complete, finish, loop, start_tracking, untrained
from vaedist.watch import fitting


def train_replicas(recipes: Sequence[Recipe], backend: ReplicaBackend, stop: Stop) -> None:
    """Trains all of them at once, each as `trainer.train` would alone; raises what that does."""
    first, console = recipes[0], Console(main=True)
    many, batch, steps = f"{len(recipes)} replicas", first.train.batch, first.train.steps
    console.say(f"{many}: {backend.describe()}, {first.train.precision}, batch {batch} of each")
    for number, recipe in enumerate(recipes):
        console.say(f"replica {number}: {recipe.run}")
        refuse_second(recipe.run)
    checkpoints = [
        Checkpoints(recipe.run / "checkpoints", first.checkpoint.keep, first.checkpoint.keep_every)
        for recipe in recipes
    ]
    data, objectives, snapshots = open_runs(recipes, backend, checkpoints, console)
    if first.train.tf32 and not backend.has_tf32:
        console.say(f"train.tf32=true has no effect on {backend.describe()}")
    with fitting():
        objective = Replicas(objectives, backend.device)
        groups = objective.param_groups([vars(recipe.optimizer) for recipe in recipes])
        model = backend.prepare(objective, first.optimizer.build(groups), snapshots)
    progress, meters = Progress(), Meters(backend.world)
    if snapshots:
        progress, meters.rows = snapshots[0].progress, merged([snapshot.meters for snapshot in snapshots])
    begin_tracking = [
        partial(start_tracking, recipe, backend, data, each, console, progress.step)
        for recipe, each in zip(recipes, checkpoints, strict=True)
    ]
    if progress.step >= steps:
        for recipe, each, begin in zip(recipes, checkpoints, begin_tracking, strict=True):
            finish(recipe, progress.step, each, begin)
            console.say(complete(recipe.run, progress.step))
        return
    if snapshots:
        console.say(f"{many}: resumed at step {progress.step}")
    stream = Stream(
        data.train,
        orders=[data.order(fork(recipe.seed, "order", k)) for recipe in recipes for k in range(objective.streams)],
        rows=lambda seen: backend.world.positions(seen, batch),
        batch=batch,
        device=backend.device,
    )
    with ExitStack() as opened:
        trackers = [opened.enter_context(begin()) for begin in begin_tracking]
        opened.pop_all()  # from here on the loop closes them
    writer = Writer(partial(save_all, checkpoints, recipes), first.checkpoint.required, console.say)
    session = ReplicaSession(
        recipes, backend, data,
        objective,  # type: ignore[arg-type]
        model, progress, meters, stream, Trackers(trackers), writer, console,
    )  # fmt: skip
    try:
        loop(session, stop)
    except DivergedError as error:
        raise DivergedError(f"{error}; without that replica the others go on from their last checkpoints") from error


@fitting()
def open_runs(
    recipes: Sequence[Recipe], backend: ReplicaBackend, checkpoints: Sequence[Checkpoints], console: Console
) -> tuple[Dataset, list[Objective], list[Snapshot]]:
    """The data set, the objectives with the weights that they begin or go on with, and of the latter the snapshots."""
    first, world = recipes[0], backend.world
    library = first.data.find(console.say)
    objectives = [untrained(recipe, library.manifest, world).to(backend.dtype) for recipe in recipes]
    first.evaluate.require(library.manifest, objectives[0].vae.latent)
    latent, batch = objectives[0].vae.latent, first.train.batch
    if batch * batch * latent > CHUNK:  # which are computed in parts, by code that vmap cannot follow
        raise ConfigError(
            f"train.batch={batch}: replicas with {latent} latents take at most {isqrt(CHUNK // latent)} images"
        )
    snapshots = newest_common(checkpoints, console.say)
    for objective, recipe, snapshot in zip(objectives, recipes, snapshots, strict=False):
        refuse_other_run(snapshot, recipe, library.manifest.digest)
        load_weights(objective, snapshot)
    streams = len(recipes) * objectives[0].streams
    data = first.data.open(
        library, console.say, device=backend.device, streams=streams, threads=backend.threads, quiet=False
    )
    return data, objectives, snapshots


class ReplicaSession(Session):
    """A session whose values have a row for each of the recipes."""

    backend: ReplicaBackend
    objective: Replicas  # type: ignore[assignment]

    @property
    def smaller(self) -> str:
        return f"fewer replicas than {len(self.recipes)} take less"

    def micros(self, batch: Batch) -> list[Any]:
        noise = ReplicaNoise(tuple(recipe.seed for recipe in self.recipes), batch.positions[0], self.objective.which)
        images = batch.images[:, 0].unflatten(0, (len(self.recipes), -1))
        pixels = torch.vmap(lambda which, images: self.pixels(images, replace(noise, which=which)))
        return [(pixels(noise.which, images), noise)]

    def look(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """One replica after the other, since some evaluators take a CPU's time and others all of the memory."""
        numbers: dict[str, list[float]] = {}
        pictures: dict[str, list[Any]] = {}
        for recipe, objective in zip(self.recipes, self.backend.observed_each(), strict=True):
            found, drawn = evaluators.run(self.subject(recipe, objective))
            for name, value in found.items():
                numbers.setdefault(name, []).append(value)
            for name, picture in drawn.items():
                pictures.setdefault(name, []).append(picture)
        return numbers, pictures
