"""What can be known to be wrong with a job before its processes start, said in seconds and before GPUs wait for it."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.distributed.run import get_args_parser

from launch.slurm.sweep import combinations, group
from shards.manifest import NAME
from shards.reading.library import Library
from shards.remote.fetch import is_remote
from vaedist.config import ConfigError
from vaedist.recipe import Recipe, load_all
from vaedist.tracker import foreseen, refuse_second
from vaedist.world import World

Announce = Callable[[str], None]
PORTS = range(20_000, 32_000)  # below those that a system gives to whoever asks for any
APART = 4_999  # has no factor in common with their number: whose port is taken does not take that of the next job
GRACE = "--shutdown-timeout 150"  # seconds, of the 180 before a time limit
MOMENTS = 3  # numbers of a checkpoint for each weight: itself and Adam's two
SPARE = 2**28  # bytes for metrics, pictures and W&B


def runs_of(words: Sequence[str], sweep: Sequence[str]) -> list[list[str]]:
    """The words of each run that a job or a job array is to do."""
    runs = combinations(sweep)
    grouped = any(word.startswith("track.group=") for word in words)
    together = [] if grouped or not sweep else [f"track.group={group(words, sweep)}"]
    return [[*words, *chosen, *together] for chosen in runs]


def recipes_of(words: Sequence[str]) -> list[Recipe]:
    """The recipe of a job's run, or of each of its replicas. Raises ConfigError, also for what no job can do."""
    recipes, dry_run = load_all(words)
    if dry_run:
        raise ConfigError("command line: dry_run=true prints a recipe: give it to vaedist/train.py, or --dry-run here")
    return recipes


def check(recipes: Sequence[Recipe], processes: int, announce: Announce) -> None:
    """Raises one of the trainer's USER_ERRORS if this job cannot start on so many processes."""
    recipe = recipes[0]  # replicas differ in a number or two
    if len(recipes) > 1 and processes > 1:
        raise ConfigError(f"train.replicas={len(recipes)} is for one process, not {processes}: ask for one GPU")
    recipe.train.local(processes)
    for each in recipes:
        refuse_second(each.run)
    if recipe.data.draw and not (Path(recipe.data.shards) / NAME).exists():
        announce(f"{recipe.data.shards}: {recipe.data.draw:,} faces will be drawn by the job")
    else:
        _check_data(recipe, len(recipes), announce)
    announce(f"W&B: {foreseen(recipe.track)}")


def _check_data(recipe: Recipe, runs: int, announce: Announce) -> None:
    library = recipe.data.find(announce)
    for split, found in library.manifest.splits.items():
        if not library.is_fetched(split):
            for number in range(len(found.shards)):
                library.path(split, number)  # that it is there, and as long as it must be
    announce(f"{library.location}: {library.manifest.split('train').count:,} images to train on")
    recipe.evaluate.require(library.manifest, recipe.model.latent)
    _check_room(recipe, runs, library, announce)


def _check_room(recipe: Recipe, runs: int, library: Library, announce: Announce) -> None:
    """Raises ConfigError where the checkpoints of so many runs have no room beside one another."""
    shape = (library.manifest.channels, recipe.data.size, recipe.data.size)
    objective = recipe.objective.build(
        recipe.model.build(shape, World()), World(), library.manifest.split("train").count
    )
    weights = sum(weight.numel() for weight in objective.parameters())
    copies = runs * (recipe.checkpoint.keep + 1)  # a new one is whole before an old one goes
    need = copies * 4 * weights * (MOMENTS + (recipe.train.ema is not None)) + SPARE
    above = next(path for path in (recipe.run.absolute(), *recipe.run.absolute().parents) if path.exists())
    free = shutil.disk_usage(above).free
    room = f"{need / 1e9:,.1f} GB for {copies} checkpoints of {weights:,} weights, {free / 1e9:,.1f} GB free"
    if need > free:
        raise ConfigError(f"{recipe.run}: the disk has no room: {room}; make room, or say run=ELSEWHERE")
    announce(f"{recipe.run}: {room}")


def staged(words: Sequence[str], recipe: Recipe, stage: str) -> list[str]:
    """The words with which each node copies the shards to its directory `stage`, and decodes them there."""
    shards = recipe.data.shards
    if recipe.data.draw:
        raise ConfigError(f"environment: STAGE={stage} copies a packed set, but data.draw={recipe.data.draw} draws one")
    if not is_remote(shards):
        shards = f"file://{Path(shards).absolute()}"
    kept = [word for word in words if not word.startswith(("data.shards=", "data.cache="))]
    return [*kept, f"data.shards={shards}", f"data.cache={stage}"]


def settled(words: Sequence[str], recipes: Sequence[Recipe]) -> list[str]:
    """The words with the run directories among them: those that are added later are to change nothing about them."""
    runs = [str(recipe.run) for recipe in recipes]
    return [
        *(word for word in words if not word.startswith("run=")),
        f"run={runs[0] if len(runs) == 1 else json.dumps(runs)}",
    ]


def free_port(job: int) -> int:
    """A port of this host that nobody listens on, another one for each job that starts here."""
    for number in range(len(PORTS)):
        port = PORTS[(job + number * APART) % len(PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise ConfigError(f"{socket.gethostname()}: no port from {PORTS.start} to {PORTS.stop - 1} is free")


def grace() -> str:
    """What makes torchrun leave its processes time to save; nothing where, as in torch 2.11, 30 s are all they get."""
    return GRACE if GRACE.split()[0] in get_args_parser().format_help() else ""


def chosen(runs: list[list[str]]) -> list[str]:
    """The words of the run that this task of a job array is to do. Raises ConfigError."""
    number = os.environ.get("SLURM_ARRAY_TASK_ID")
    if number is None and len(runs) == 1:
        return runs[0]
    if number is None or int(number) >= len(runs):
        raise ConfigError(f"command line: --sweep makes {len(runs)} runs: say sbatch --array=0-{len(runs) - 1}")
    return runs[int(number)]
