"""What checkpoints on the disk hold, and whether every byte is as it was written; without torch, and so at once."""

import argparse
import hashlib
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open

from vaedist.checkpoint import (
    NOT_WHOLE,
    OPTIMIZER,
    SUMS,
    WEIGHTS,
    CheckpointError,
    drafts,
    is_named,
    newest_first,
    plain,
    state_content,
    sums,
)
from vaedist.config import flatten

SHOWN = ("objective.name", "model.name", "train.precision", "train.batch", "seed")  # of the recipe
UNITS = {"days": 86400, "hours": 3600, "minutes": 60}
Tensors = dict[str, tuple[str, list[int]]]  # type and shape by name


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 where something is damaged, or where nothing is."""
    parser = argparse.ArgumentParser(prog="python -m vaedist.checkpoint", description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    show = commands.add_parser("inspect", help="list the checkpoints and describe the newest")
    show.add_argument("--tensors", action="store_true", help="name every tensor of it")
    check = commands.add_parser("verify", help="compare all files with their checksums")
    for command in (show, check):
        command.add_argument("path", type=Path, metavar="PATH", help="a run, its checkpoints, or one of them")
    options = parser.parse_args(arguments)
    try:
        paths, unfinished = find(options.path)
        whole = verify(paths) if options.command == "verify" else inspect(paths, options.tensors)
    except CheckpointError as error:
        print(f"vaedist: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # of a path that is none
        print(f"vaedist: {str(options.path)[:100]}: {error.strerror}", file=sys.stderr)
        return 1
    for draft in unfinished:
        print(f"{draft}: a draft: being written, or left by a run that died")
    return 0 if whole else 1


def find(path: Path) -> tuple[list[Path], list[Path]]:
    """The checkpoints that the user means, newest first, and the drafts beside them."""
    if is_named(path.resolve()):
        return [path.resolve()], []
    for directory in (path, path / "checkpoints"):
        found = newest_first(directory), drafts(directory)
        if any(found):
            return found
    raise CheckpointError(f"{path}: no checkpoint; name a run, the checkpoints in it, or one of these")


def verify(paths: list[Path]) -> bool:
    """Prints a line for each checkpoint; whether all are whole."""
    whole = True
    for path in paths:
        damage = "".join(f"{reason}; " for reason in damages(path)).removesuffix("; ")
        print(f"{path}: {damage or 'whole'}", flush=True)
        whole = whole and not damage
    return whole


def damages(path: Path) -> Iterator[str]:
    """What is wrong with a checkpoint."""
    try:
        for name, expected in sums(path).items():
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    yield f"{name}: the checksum differs"
        plain(path, state_content(path))
        headers(path)
    except NOT_WHOLE as error:
        yield f"not a whole checkpoint ({type(error).__name__}: {error})"


def inspect(paths: list[Path], every_tensor: bool) -> bool:
    """Prints a line for each checkpoint, then what the newest is and holds; whether all can be read."""
    newest, whole = None, True
    print(f"{'checkpoint':<16}{'step':>12}{'seen':>16}{'MB':>10}  written")
    for path in paths:
        try:
            state, tensors = plain(path, state_content(path)), headers(path)
        except NOT_WHOLE as error:
            print(f"{path.name:<16}not a whole checkpoint ({type(error).__name__}: {error})")
            whole = False
            continue
        newest = newest or (path, state, tensors)
        size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
        progress = state["progress"]
        print(f"{path.name:<16}{progress.step:>12,}{progress.seen:>16,}{size:>10,.1f}  {age(path)} ago")
    if newest:
        print()
        for line in description(*newest, every_tensor):
            print(line)
    return whole


def description(path: Path, state: dict[str, Any], tensors: dict[str, Tensors], every: bool) -> Iterator[str]:
    recipe = flatten(state["recipe"])
    yield path.name
    yield f"  {'recipe':<16}{' '.join(f'{key}={recipe[key]}' for key in SHOWN if key in recipe)}"
    yield f"  {'data set':<16}{state['data'][:12]}"
    weights, moments = tensors[WEIGHTS], tensors[OPTIMIZER]
    learned = {key.rpartition("/")[0] for key in moments}
    for player in dict.fromkeys(name.partition(".")[0] for name in weights if name in learned):
        own = [name for name in weights if name in learned and name.partition(".")[0] == player]
        count = sum(math.prod(weights[name][1]) for name in own)
        yield f"  {player:<16}{count:,} weights in {len(own)} tensors"
    for file, found in tensors.items():
        kinds = Counter(kind for kind, _ in found.values())
        yield f"  {file}: {len(found)} tensors, {', '.join(f'{count} {kind}' for kind, count in kinds.items())}"
        if every:
            yield from (f"    {name:<60}{kind:<6}{shape}" for name, (kind, shape) in found.items())


def headers(path: Path) -> dict[str, Tensors]:
    """The tensors of every file that has some."""
    return {name: _header(path / name) for name in sums(path) if name.endswith(".safetensors")}


def _header(path: Path) -> Tensors:
    with safe_open(path, "np") as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}


def age(path: Path) -> str:
    seconds = time.time() - (path / SUMS).stat().st_mtime
    for unit, length in UNITS.items():
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
