"""How long a run takes to its first step, new and resumed at step 900,000, on a set as large as CelebA.

    ./run python benchmarks/startup.py [--images 162770] [--turns 5] [--shards DIRECTORY]

The set has as many images as CelebA trains on, the photographs of --shards (without it, of recipe=quickstart) again and
again, in its layout; that it is packed and decoded is timed too. The starts take turns, each a new process; a time is
the median from the process's start to the line of its first step, and beside it its CPU time, which other programs
change least. A run resumed there is one that was saved after one
step, saved again with another clock: everything a run needs is a function of that, and of the weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from loader import extract

from shards.reading.library import Library
from vaedist.checkpoint import Checkpoints, Progress, State
from vaedist.recipe import load

ROOT = Path(__file__).resolve().parents[1]
STEP, EVERY = 900_000, 500  # resumed after so many steps, of which every 500th was logged
HELD_OUT = 1000
IMPORTS = "from vaedist.train import main; main(['recipe=vae', 'dry_run=true']); import vaedist.trainer"


class Seconds(NamedTuple):
    wall: float
    cpu: float


def celeba(paths: list[Path], count: int, folder: Path) -> Path:
    """A source in CelebA's layout, of hard links to some photographs."""
    (folder / "img_align_celeba").mkdir(parents=True)
    names = [f"{number:06d}.jpg" for number in range(1, count + HELD_OUT + 1)]
    for number, name in enumerate(names):
        os.link(paths[number % len(paths)], folder / "img_align_celeba" / name)
    rows = "".join(f"{name} {1 - 2 * (number % 2)}\n" for number, name in enumerate(names))
    (folder / "list_attr_celeba.txt").write_text(f"{len(names)}\nSmiling\n{rows}")
    rows = "".join(f"{name} {int(number >= count)}\n" for number, name in enumerate(names))
    (folder / "list_eval_partition.txt").write_text(rows)
    return folder


def python(*words: str | Path) -> None:
    subprocess.run([sys.executable, *words], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def until_step(number: int, words: list[str]) -> None:
    """A run until it has made this step; it is killed then."""
    command = [sys.executable, str(ROOT / "vaedist" / "train.py"), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith(f"step {number}/"):
                run.kill()
                return
    raise SystemExit(f"the run ended before step {number}")


def seconds(call: Callable[[], object]) -> Seconds:
    start = Seconds(time.perf_counter(), cpu_seconds())
    call()
    return Seconds(time.perf_counter() - start.wall, cpu_seconds() - start.cpu)


def cpu_seconds() -> float:
    """Of this process and all that it has started and that have ended."""
    return sum(os.times()[:4])


def move(run: Path) -> None:
    """The run saved after its first step, as one that was saved after `STEP` steps."""
    checkpoints = Checkpoints(run / "checkpoints", keep=1)
    snapshot = checkpoints.newest(print)
    assert snapshot is not None
    state = State(**{field.name: getattr(snapshot, field.name) for field in fields(State)})
    batch = snapshot.progress.seen
    checkpoints.save(replace(state, progress=Progress(STEP, STEP * batch)))
    row = json.loads((run / "metrics.jsonl").read_text())
    rows = [row | {"step": step, "seen": step * batch} for step in range(EVERY, STEP + 1, EVERY)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def starts(words: list[str], folder: Path, turns: int) -> dict[str, list[Seconds]]:
    saved = [*words, f"run={folder / 'saved'}", "track.wandb=off"]
    python("vaedist/train.py", *saved, "train.steps=1", "evaluate.names=[]")
    move(folder / "saved")

    def new(turn: int, wandb: str) -> list[str]:
        return [*words, f"run={folder / wandb}{turn}", f"track.wandb={wandb}"]

    found: dict[str, list[Seconds]] = {}
    for turn in range(turns):
        programs = {
            "`import torch`": partial(python, "-c", "import torch"),
            "all imports of a run": partial(python, "-c", IMPORTS),
            "step 1": partial(until_step, 1, new(turn, "off")),
            "step 1, with W&B offline": partial(until_step, 1, new(turn, "offline")),
            f"step {STEP + 1:,}, resumed": partial(until_step, STEP + 1, saved),
        }
        for what, program in programs.items():
            found.setdefault(what, []).append(seconds(program))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=162_770)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--shards", type=Path)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=ROOT / "data") as temporary:  # hard links, and gigabytes
        folder = Path(temporary)
        library = Library(str(told.shards), folder) if told.shards else load(["recipe=quickstart"])[0].data.find(print)
        source = celeba(extract(library, folder / "files"), told.images, folder / "source")
        print("| until | s | | CPU s | |\n|---|---|---|---|---|")
        tell("packed", [seconds(lambda: python("-m", "shards", "pack", "celeba", source, folder / "set"))])
        warm = ("-m", "shards", "warm", folder / "set", "--size", "64", "--crop", "148", "--cache", folder / "cache")
        tell("decoded", [seconds(lambda: python(*warm))])
        tell("found decoded", [seconds(lambda: python(*warm))])
        words = ["recipe=factorvae", f"data.shards={folder / 'set'}", f"data.cache={folder / 'cache'}", "track.every=1"]
        for what, found in starts(words, folder, told.turns).items():
            tell(what, found)


def tell(what: str, found: list[Seconds]) -> None:
    columns = (
        f"{statistics.median(column):.1f} | {min(column):.1f} to {max(column):.1f}"
        for column in zip(*found, strict=True)
    )
    print(f"| {what} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
