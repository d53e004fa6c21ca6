"""How long training stands still for a checkpoint, written meanwhile or beside it, and how far the writing slows steps.

    ./run python benchmarks/checkpoint.py [DIRECTORY]      on the disk of DIRECTORY; without one, of the temporary files

Both ways take turns in one process on one thread; a number is the median of their turns. Training stands still for the
copy of weights and moments, and for what of the writing it waits for. A step is one of Adam on a small network.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from vaedist.backend import Backend, Config, on_cpu
from vaedist.checkpoint import Checkpoints, Progress, State, Writer

TURNS, SIZES = 5, (57, 500)  # MB: a FactorVAE at 64 x 64, and a network nine times as large


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), fused=True)


def step(module: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> float:
    """The seconds of a step."""
    start = time.perf_counter()
    module(images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def large(megabytes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Twelve layers that have, with their moments, so many MB."""
    width = int((megabytes * 1e6 / 12 / 12) ** 0.5)
    module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(12)))
    optimizer = adam(module)
    step(module, optimizer, torch.randn(1, width))
    return module, optimizer


def compare(megabytes: int, folder: Path) -> None:
    """Prints the rows of one size."""
    module, optimizer = large(megabytes)
    network = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    small, images = (network, adam(network)), torch.randn(64, 1024)
    backend = Backend(Config())
    backend.prepare(module, optimizer, None)
    checkpoints = Checkpoints(folder, keep=1)
    still: dict[str, list[float]] = {"synchronous": [], "asynchronous": []}
    copying, alone, beside, writing = [], [], [], []
    with Writer(checkpoints.save, required=True, warn=print) as writer:
        for turn in range(2 * TURNS):
            way = list(still)[turn % 2]
            alone += [step(*small, images) for _ in range(50)]
            start = time.perf_counter()
            weights, moments = on_cpu(backend.weights()), on_cpu(backend.moments())
            copying.append(time.perf_counter() - start)
            state = State(
                progress=Progress(turn, turn), meters=[], scaling={}, data="", recipe={},
                weights=weights, moments=moments,
            )  # fmt: skip
            if way == "synchronous":
                checkpoints.save(state)
            else:
                writer.save(state)
            still[way].append(time.perf_counter() - start)
            if way == "asynchronous":
                while not (folder / f"step-{turn:08d}").exists():
                    beside.append(step(*small, images))
                writing.append(time.perf_counter() - start)
                writer.wait()
    numbers = {way: statistics.median(seconds) for way, seconds in still.items()}
    slower = statistics.fmean(beside) / statistics.fmean(alone)
    for way, seconds in numbers.items():
        ratio = numbers["synchronous"] / seconds
        print(f"{megabytes:>4} MB {way:<14}{1000 * seconds:>20,.1f}{ratio:>10.1f}x")
    print(
        f"        of which the copy {1000 * statistics.median(copying):,.1f} ms; written after "
        f"{1000 * statistics.median(writing):,.0f} ms, in which {len(beside) / TURNS:.0f} steps took {slower:.2f} x as "
        f"long as alone, the longest {1000 * max(beside):,.0f} ms (alone {1000 * max(alone):,.0f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path)
    given = parser.parse_args().directory
    torch.set_num_threads(1)
    print(f"{'':22}{'ms standing still':>20}{'shorter':>11}")
    for megabytes in SIZES:
        with tempfile.TemporaryDirectory(dir=given) as folder:
            compare(megabytes, Path(folder))


if __name__ == "__main__":
    main()
