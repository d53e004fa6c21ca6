"""A run from its recipe to its last checkpoint: the loop, read top to bottom."""

import hashlib
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from shards.files import replacing
from shards.manifest import Manifest, ShardError
from vaedist import curves
from vaedist.backend import Backend, on_cpu
from vaedist.checkpoint import CheckpointError, Checkpoints, Progress, Snapshot, State, Writer
from vaedist.config import ConfigError, as_dict, dump
from vaedist.console import Console
from vaedist.data import Dataset
from vaedist.data.stream import Batch, Stream
from vaedist.debug import DivergedError, DriftError, compare_replicas, read, refuse_nonfinite
from vaedist.environment import add_start, environment
from vaedist.graph import Replayed
from vaedist.meters import Meters, Speed, over_micros
from vaedist.noise import fork
from vaedist.objectives import Objective
from vaedist.recipe import Recipe, refuse_other_run
from vaedist.session import Session
from vaedist.stop import COMPLETE, REQUEUE, SAVE, STOP, Requests, Stop, StoppedError, ask_again
from vaedist.tracker import Tracker, open_tracker, refuse_second
from vaedist.watch import TorchError, Watch, fitting
from vaedist.world import World

# Their message is a line for the user.
USER_ERRORS = (ConfigError, ShardError, CheckpointError, DivergedError, DriftError, TorchError, OSError)
T = TypeVar("T")


def train(recipe: Recipe, backend: Backend, stop: Stop) -> Objective:
    """Trains to `train.steps`, from the newest checkpoint of the run directory if there is one; every rank calls it.

    Returns the trained objective. Raises one of USER_ERRORS; what is wrong on any rank before the first step ends all.
    Raises StoppedError, on every rank and after a checkpoint, when any rank was asked to stop.
    """
    world, console = backend.world, Console(main=backend.main)
    batch, accumulate, steps = recipe.train.batch, recipe.train.accumulate, recipe.train.steps
    local = recipe.train.local(world.size)
    console.say(
        f"{recipe.run}: {backend.describe()}, {recipe.train.precision}, batch {batch}"
        f"{f' in {accumulate} micro-batches' if accumulate > 1 else ''}, {local} images at a time on each"
    )
    checkpoints = Checkpoints(recipe.run / "checkpoints", recipe.checkpoint.keep, recipe.checkpoint.keep_every)
    on_all_ranks(world, lambda: refuse_second(recipe.run) if backend.main else None)
    data, objective, snapshot = on_all_ranks(world, lambda: open_run(recipe, backend, checkpoints, console))
    if recipe.train.compile:
        console.say("compiling the objective: the first step takes about a minute")
    if recipe.train.tf32 and not backend.has_tf32:
        console.say(f"train.tf32=true has no effect on {backend.describe()}")
    with fitting():
        model = backend.prepare(objective, recipe.optimizer.build(objective.param_groups()), snapshot)
    progress, meters = Progress(), Meters(world)
    if snapshot is not None:
        progress, meters.rows = snapshot.progress, snapshot.meters
        if progress.step < steps:
            console.say(f"{recipe.run}: resumed at step {progress.step}")
    refuse_disagreement(recipe, progress, data, world)
    begin_tracking = partial(start_tracking, recipe, backend, data, checkpoints, console, progress.step)
    if progress.step >= steps:
        rest = partial(finish, recipe, progress.step, checkpoints, begin_tracking)
        on_all_ranks(world, lambda: rest() if backend.main else None)
        console.say(complete(recipe.run, progress.step))
        return objective
    if accumulate > 1 and objective.vae.couples_rows:
        console.say("batch normalisation takes the statistics of a micro-batch: train.accumulate changes this run")

    stream = Stream(
        data.train,
        orders=[data.order(fork(recipe.seed, "order", k)) for k in range(objective.streams)],
        rows=lambda seen: world.positions(seen, batch, accumulate),
        batch=batch,
        device=backend.device,
    )
    tracker = on_all_ranks(world, begin_tracking)
    writer = Writer(checkpoints.save, recipe.checkpoint.required, console.say)
    loop(Session(
        [recipe], backend, data, objective, model, progress, meters, stream, tracker, writer, console
    ), stop)  # fmt: skip
    return objective


def loop(session: Session, stop: Stop) -> None:
    """Trains from `session.progress` to the last step; see `train` for what it raises."""
    recipe, backend, data, objective = session.recipes[0], session.backend, session.data, session.objective
    progress, meters, stream, tracker = session.progress, session.meters, session.stream, session.tracker
    writer, console, world, steps = session.writer, session.console, backend.world, recipe.train.steps
    runs = [each.run for each in session.recipes]
    speed = Speed(stream, progress.seen)
    watch = Watch(recipe.debug, recipe.run, session.smaller, progress, world, backend.device, console.say)
    console.start(steps, progress.step)
    vote, asked = backend.vote(recipe.train.timeout), 0
    requests = Requests(runs if backend.main else [])
    stop.patiently()
    batches = stream.batches(start=progress.seen)
    with closing(batches), closing(console), tracker, writer, watch, named(progress):
        take = Replayed(partial(take_step, session), backend, console.say)
        for batch in batches:
            last = progress.step + 1 == steps
            due = last or (progress.step + 1) % recipe.track.every == 0
            terms, latents = take(batch, progress.step, due)
            meters.add(terms)
            progress.step += 1
            progress.seen += stream.batch
            console.step()

            step, asked = progress.step, vote(max(stop.asked, requests()))
            save = last or asked or step % recipe.checkpoint.every == 0
            if save or step % recipe.debug.replicas == 0:
                compare_replicas(step, objective, world)
            row: dict[str, Any] = {}
            if due:
                row |= {f"train/{name}": value for name, value in meters.means(step).items()}
                if step % recipe.track.every == 0:  # else a run that goes on has its next row of these, too
                    meters.clear()
                row |= {f"train/{name}": value for name, value in backend.overflows(step).items()}
                row |= {f"train/{name}": value for name, value in backend.gradient_norms(step).items()}
                row |= read(step, {f"latent/{name}": value for name, value in latents.items()})
                row |= speed.measure(progress.seen) | watch.memory()
            if last or step % recipe.evaluate.every == 0:
                meters.reduce(step)  # a model that has diverged is not worth a look
                numbers, pictures = session.look()
                refuse_nonfinite(step, numbers)
                row |= {f"eval/{name}": value for name, value in numbers.items()}
                tracker.pictures(pictures, step=step, seen=progress.seen)
                speed.restart(progress.seen)
            if row:
                epoch = progress.seen / data.train.count
                tracker.log({"step": step, "seen": progress.seen, "epoch": epoch} | row)
                console.row(step, row)
                on_all_ranks(world, writer.look)
            if save:
                meters.reduce(step)
                # finite terms may have gradients that are not, which the next step's terms would tell too late
                weights, moments = backend.weights(), backend.moments()
                read(step, backend.largest(weights))
                on_all_ranks(world, writer.wait)
                if backend.main:
                    writer.save(State(
                        progress=replace(progress), meters=list(meters.rows), scaling=backend.scaling(),
                        data=data.digest, recipe=as_dict(recipe), weights=on_cpu(weights), moments=on_cpu(moments),
                    ))  # fmt: skip
                speed.restart(progress.seen)
            if asked == SAVE and on_all_ranks(world, writer.wait):  # rank 0 knows, which alone removes files
                requests.granted(SAVE)
                console.say(f"{recipe.run}: saved at step {step}, as the file SAVE asked")
            watch.step()
            if last or asked > SAVE:
                break
        on_all_ranks(world, writer.close)
        stopped = StoppedError(asked, step) if asked > SAVE and not last else None
        if stopped and stopped.requeue and backend.main:
            for run in runs:
                ask_again(run)  # now: a launcher may not wait for the end of W&B
            tracker.preempted()
        if last and backend.main:
            tracker.complete(step)
        requests.granted(SAVE)
        if last or asked == STOP:  # a STOP that came too late for this vote is one for the job that goes on
            requests.granted(STOP)
    vote.close()
    if stopped:
        console.say(f"{recipe.run}: {stopped}")
        world.everyone(None)  # launchers end all when one process has ended
        raise stopped
    for run in runs:
        if backend.main:
            end(run, steps)
        console.say(complete(run, steps))


def take_step(
    session: Session, batch: Batch, done: Tensor, measured: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One optimiser step: its terms, of this rank's rows, and where it is measured what its latents are like.

    done: how many steps were made before. It reads no number from the device, and everything that it computes follows
    from weights, moments, `batch` and `done`.
    """
    backend, objective = session.backend, session.objective
    micros, found = session.micros(batch), []
    with torch.no_grad(), backend.autocast():
        surveyed = objective.survey(micros, done)
        latents = objective.latents(micros) if measured else {}
    for (pixels, noise), survey in zip(micros, surveyed, strict=True):
        with backend.accumulate(session.model):
            terms = session.model(pixels, noise, done, survey)
            backend.backward(terms["loss"])
            backend.step(session.progress.step + 1, measured)
        found.append(terms)
    means = over_micros(found)
    objective.after_step(means)
    return means, latents


@contextmanager
def named(progress: Progress) -> Iterator[None]:
    """Notes on any error how far the run was."""
    try:
        yield
    except Exception as error:
        error.add_note(f"after step {progress.step}")
        raise


@fitting()
def open_run(
    recipe: Recipe, backend: Backend, checkpoints: Checkpoints, console: Console
) -> tuple[Dataset, Objective, Snapshot | None]:
    """The data set, the untrained objective, and the newest checkpoint if it is of this very run."""
    library = recipe.data.find(console.say)
    objective = untrained(recipe, library.manifest, backend.world)
    recipe.evaluate.require(library.manifest, objective.vae.latent)
    snapshot = checkpoints.newest(console.say)
    if snapshot is not None:
        refuse_other_run(snapshot, recipe, library.manifest.digest)
    data = recipe.data.open(  # last: it may decode all images
        library,
        console.say,
        device=backend.device,
        streams=objective.streams,
        threads=backend.threads,
        quiet=not backend.main,
    )
    return data, objective, snapshot


def untrained(recipe: Recipe, manifest: Manifest, world: World) -> Objective:
    """The run's objective as its seed begins it."""
    torch.manual_seed(fork(recipe.seed, "weights"))
    shape = (manifest.channels, recipe.data.size, recipe.data.size)
    images = manifest.split("train").count * (2 if recipe.data.flip else 1)  # a mirrored image is another one
    objective: Objective = recipe.objective.build(recipe.model.build(shape, world), world, images)
    objective.require_batch(recipe.train.batch)
    return objective


def refuse_disagreement(recipe: Recipe, progress: Progress, data: Dataset, world: World) -> None:
    """Raises ConfigError, on every rank, where one is about to take other steps than rank 0, and says how."""
    said = {
        "the data set": data.digest[:12],
        "the decoded pixels": data.train.digest and data.train.digest[:12],
        "the seed": str(recipe.seed),
        "the step": str(progress.step),
        "the recipe": hashlib.sha256(dump(recipe).encode()).hexdigest()[:12],
    }
    everyone = world.everyone((platform.node(), said))
    host, first = everyone[0]
    for rank, (other_host, other) in enumerate(everyone):
        for what, value in other.items():
            if value != first[what] and None not in (value, first[what]):  # None: decoded at every access
                raise ConfigError(
                    f"{recipe.run}: the processes disagree about {what}: rank {rank} on {other_host} has {value}, "
                    f"rank 0 on {host} {first[what]}; all need the same command, files and installed packages"
                )


def start_tracking(
    recipe: Recipe, backend: Backend, data: Dataset, checkpoints: Checkpoints, console: Console, done: int
) -> Tracker:
    """The run's tracker after `done` steps; recipe.yaml and environment.json, a list of the run's starts, beside it.

    Raises ConfigError or CheckpointError where another process trains this run, or has since it was read.
    """
    if not backend.main:
        return Tracker()
    where = environment(step=done, world_size=backend.world.size, device=backend.describe(), data=data.digest)
    with ExitStack() as opened:
        tracker = opened.enter_context(open_tracker(
            recipe.track, run=recipe.run, recipe=as_dict(recipe), environment=where, done=done,
            announce=console.say, claimed=lambda: checkpoints.refuse_later(done),
        ))  # fmt: skip
        for said in (REQUEUE, COMPLETE):
            (recipe.run / said).unlink(missing_ok=True)
        if done < recipe.train.steps:  # both are of who has trained
            with replacing(recipe.run / "recipe.yaml") as file:
                file.write(dump(recipe).encode())
            add_start(recipe.run / "environment.json", where)
        opened.pop_all()
    return tracker


def finish(recipe: Recipe, step: int, checkpoints: Checkpoints, begin_tracking: Callable[[], Tracker]) -> None:
    """Of a run that has all its steps: what a process that died after the last one has not done."""
    run, last = recipe.run, step == recipe.train.steps and not checkpoints.passed_over  # else it has later rows
    (run / REQUEUE).unlink(missing_ok=True)
    mark = run / COMPLETE
    if last and not (mark.exists() and mark.read_text() == str(step)):
        with begin_tracking() as tracker:
            tracker.complete(step)
        end(run, step)


def end(run: Path, step: int) -> None:
    """The last files of a run, on rank 0."""
    if drawn(run, step).exists():
        curves.write(run)
    (run / COMPLETE).write_text(str(step))  # another process may go on by now, with more steps


def complete(run: Path, step: int) -> str:
    """The last line of a run."""
    pictures = drawn(run, step)
    return f"{run}: complete at step {step}" + (f"; pictures in {pictures}" if pictures.exists() else "")


def drawn(run: Path, step: int) -> Path:
    """The pictures of a step, if there are any."""
    return run / "pictures" / f"step-{step:08d}"


def on_all_ranks(world: World, work: Callable[[], T]) -> T:
    """The result of `work`. If it fails on any rank, all raise the first error."""
    error: Exception | None = None
    try:
        result = work()
    except USER_ERRORS as caught:
        error = caught
    errors = [other for other in world.everyone(error) if other is not None]
    if errors:
        raise errors[0]
    return result
