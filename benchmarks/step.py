"""Time of a training step of the 64x64 network: as people ordinarily write it, plainly, and here.

    ./run python benchmarks/step.py                                                       everything, on a GPU
    ./run python benchmarks/step.py --cores 1 --batches 64 --precisions fp32 --turns 15   what a CPU does in minutes

All take turns, each in a process of its own. `reference` is `reference.py` with its DataLoader over image files and its
`.item()`; `plain` its step alone, on images that are there; the others are the loop of `vaedist.trainer` itself, on the
packed set: `captured` as it is on a GPU, `eager` and `compiled` kernel by kernel, as on a CPU. A time is the median of
the turns, `x plain` the median of the turns' ratios of plain's time to the one before it, with their quartiles. Host:
until the calls had returned to a host with a GPU; without one the CPU time of threads and workers, which other programs
change least: with `--cores 1` the number to look at. Launches: what a GPU is given to do in a step; on a CPU
operations. MB: what torch has taken of a GPU, at the peak; else of the process beyond its beginning. The floors, of the
plain step: see `floors.py`.
"""

import argparse
import itertools
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import floors
import reference
import torch
from loader import extract
from turns import Candidate, Program, Turn, restrict

from shards.reading.library import Library
from vaedist.backend import Backend
from vaedist.console import Console
from vaedist.graph import WARM
from vaedist.recipe import load
from vaedist.stop import Stop
from vaedist.trainer import train

OURS = {  # mode -> what it says beyond the recipe
    "eager": ("train.capture=false",),
    "compiled": ("train.capture=false", "train.compile=true"),
}
CAPTURED: dict[str, tuple[str, ...]] = {"captured": (), "compiled, captured": ("train.compile=true",)}
NEVER = [
    "track.every=100_000",
    *(f"{at}=1_000_000_000" for at in ("evaluate.every", "checkpoint.every", "debug.replicas")),
]
PRECISIONS = {"fp32": (), "tf32": ("train.tf32=true",), "bf16": ("train.precision=bf16",)}
SECONDS = 0.5  # of a turn, or one step
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a question that leaves the GPU to those who are forked
MODES = ["reference", "plain", *OURS, *(CAPTURED if torch.cuda.is_available() else ())]


@dataclass(frozen=True)
class Case:
    objective: str
    precision: str
    batch: int
    library: Library
    files: list[Path]

    def training(self) -> tuple[reference.Training, tuple[torch.Tensor, torch.Tensor]]:
        """The plain program, and images for it on its device."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        images = self.library.manifest.split("train").count
        training = reference.Training(self.objective, images, device, bf16=self.precision == "bf16")
        first, second = torch.rand(2, self.batch, 3, 64, 64, device=device)
        return training, (first, second)

    def plain(self, after: Callable[[], None]) -> None:
        training, pair = self.training()
        while True:
            training.step(pair)
            after()

    def reference(self, after: Callable[[], None]) -> None:
        training, _ = self.training()
        for _ in reference.steps(training, reference.Files(self.files, crop=148), self.batch):
            after()

    def ours(self, *more: str) -> Program:
        def say(console: Console, line: str) -> None:
            if "kernel by kernel" in line:  # which else would be timed as captured
                raise RuntimeError(line)

        def program(after: Callable[[], None]) -> None:
            quiet = patch.multiple(Console, step=lambda self: after(), say=say)
            with quiet, tempfile.TemporaryDirectory() as run:
                place = (f"run={run}", f"data.shards={self.library.location}", "track.wandb=off", *NEVER)
                size = (f"objective={self.objective}", f"train.batch={self.batch}", "train.steps=1_000_000_000")
                recipe, _ = load(["recipe=celeba64", *place, *size, *PRECISIONS[self.precision], *more])
                train(recipe, Backend(recipe.train), Stop())

        return program

    def floors(self) -> tuple[floors.Work, floors.Rates]:
        training, pair = self.training()
        return floors.count(training, pair), floors.measure(training.device, self.precision == "bf16")


def compare(case: Case, modes: list[str], turns: int, cores: int | None) -> Iterator[str]:
    """The rows of a table."""
    programs: dict[str, Program] = {"reference": case.reference, "plain": case.plain}
    programs |= {mode: case.ours(*more) for mode, more in (OURS | CAPTURED).items()}
    candidates = {mode: Candidate(programs[mode], cores) for mode in modes}
    for candidate in candidates.values():
        candidate.turn(WARM + 2)
    steps = {mode: max(1, round(SECONDS / candidate.turn(1).wall)) for mode, candidate in candidates.items()}
    found: dict[str, list[Turn]] = {mode: [] for mode in modes}
    for _ in range(turns):
        for mode, candidate in candidates.items():
            turn = candidate.turn(steps[mode])
            found[mode].append(Turn(*(seconds / steps[mode] for seconds in turn)))
    for mode, candidate in candidates.items():
        wall, host = (statistics.median(column) for column in zip(*found[mode], strict=True))
        pairs = list(zip(found["plain"], found[mode], strict=True))
        yield (
            f"| {case.objective} | {case.precision} | {case.batch} | {mode} | {1e3 * wall:.2f} "
            f"| {case.batch / wall:,.0f} | {ratio([plain.wall / turn.wall for plain, turn in pairs])} "
            f"| {1e3 * host:.2f} | {ratio([plain.host / turn.host for plain, turn in pairs])} "
            f"| {candidate.launches():,} | {candidate.memory() / 1e6:,.0f} |"
        )
        candidate.close()


def ratio(found: list[float]) -> str:
    low, middle, high = statistics.quantiles(found, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def floor(case: Case, cores: int | None) -> str:
    with ProcessPoolExecutor(1, get_context("fork"), restrict, (cores,)) as pool:
        work, rates = pool.submit(case.floors).result()
    return (
        f"| {case.objective} | {case.precision} | {case.batch} | {work.flops / 1e9:.1f} "
        f"| {1e3 * work.flops / rates.flops:.2f} | {work.bytes / 1e6:,.0f} | {1e3 * work.bytes / rates.copied:.2f} "
        f"| {rates.flops / 1e12:.3g} | {rates.copied / 1e9:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=["vae", "factorvae", "betatcvae"])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256, 1024, 4096])
    parser.add_argument("--modes", nargs="+", default=MODES, help="of which `plain` is always there")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--cores", type=int, help="that each program may use; all without it")
    parser.add_argument("--shards", help="a packed set of JPEGs; without it that of recipe=quickstart")
    told = parser.parse_args()
    packed = [f"data.shards={told.shards}", "data.draw=0"] if told.shards else []
    recipe, _ = load(["recipe=quickstart", *packed])
    library = recipe.data.find(print)
    modes = list(dict.fromkeys([*told.modes, "plain"]))
    with tempfile.TemporaryDirectory() as temporary:
        files = extract(library, Path(temporary) / "files")
        cases = [
            Case(objective, precision, batch, library, files)
            for objective, precision, batch in itertools.product(told.objectives, told.precisions, told.batches)
        ]
        print("| objective | precision | batch | | ms | images/s | x plain | host ms | x plain | launches | MB |")
        print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
        for case in cases:
            for line in compare(case, modes, told.turns, told.cores):
                print(line, flush=True)
        print("\n| objective | precision | batch | GFLOP | ms at least | MB | ms at least | TFLOP/s | GB/s |")
        print("|---|---|---|---|---|---|---|---|---|", flush=True)
        for case in cases:
            print(floor(case, told.cores), flush=True)


if __name__ == "__main__":
    main()
