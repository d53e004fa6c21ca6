"""What each objective costs: time of a training step as a ratio to the plain VAE's, and bytes between the ranks.

    ./run python benchmarks/objectives.py [--batch 64] [--turns 7]

All objectives take turns in one process on the same random images, network and optimiser; a number is the median of
the turns' ratios. `accumulated` is the step in two micro-batches, as a ratio to the same of the VAE. `report` is what a
logged step costs on top. The bytes are counted in the collectives of one step of two processes: what a rank sends into
them besides the gradients, which are 4 bytes a parameter.
"""

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from vaedist.config import available
from vaedist.models import conv64
from vaedist.noise import Noise
from vaedist.objectives import Micro, Objective
from vaedist.world import World

SHAPE, IMAGES = (3, 64, 64), 162_770  # CelebA's training images
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "betatcvae": [{"sampling": "mws"}, {"sampling": "mss"}],
    "constrainedvae": [{}, {"constrained": "recon", "bound": 7000.0}],
    "dipvae": [{"kind": "i"}, {"kind": "ii"}],
}
BASELINE = "vae"


def candidates() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """A label, the objective's name and its settings; the baseline first."""
    for name in sorted(available("vaedist.objectives"), key=lambda name: (name != BASELINE, name)):
        for settings in VARIANTS.get(name, [{}]):
            yield (
                " ".join([name, *[str(value) for value in settings.values() if isinstance(value, str)]]),
                name,
                settings,
            )


def build(name: str, settings: dict[str, Any], world: World, device: torch.device) -> Objective:
    torch.manual_seed(0)
    vae = conv64.Config().build(SHAPE, world)
    config = import_module(f"vaedist.objectives.{name}").Config(**settings)
    objective: Objective = config.build(vae, world, IMAGES)
    return objective.to(device)


def micros(streams: int, positions: Tensor) -> list[Micro]:
    """Micro-batches of random images at positions [accumulate, local]."""
    shape = (streams, positions.shape[1], *SHAPE)
    return [(torch.rand(shape, device=positions.device), Noise(0, row)) for row in positions]


def step(objective: Objective, batches: list[Micro], optimizer: torch.optim.Optimizer | None = None) -> None:
    """One optimiser step as the trainer makes it."""
    done = torch.zeros((), device=batches[0][0].device)
    with torch.no_grad():
        surveyed = objective.survey(batches, done)
    total: dict[str, Tensor] = {}
    for (images, noise), survey in zip(batches, surveyed, strict=True):
        terms = objective(images, noise, done, survey)
        (terms["loss"] / len(batches)).backward()
        total = {key: total.get(key, 0) + term.detach().double() / len(batches) for key, term in terms.items()}
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    objective.after_step(total)


def seconds(device: torch.device, call: Callable[..., object], *arguments: object) -> float:
    """Of the device: on a CPU those that all threads together were at work, which other programs do not change."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    call(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def times(batch: int, turns: int, device: torch.device) -> dict[str, list[float]]:
    """For every candidate the time of a step, of one in two micro-batches, and of a report, as ratios."""
    whole = torch.arange(batch, device=device)[None]
    ready = []
    for label, name, settings in candidates():
        objective = build(name, settings, World(), device)
        optimizer = torch.optim.AdamW(objective.param_groups(), lr=1e-4, weight_decay=0.0, fused=True)
        one, two = micros(objective.streams, whole), micros(objective.streams, whole.view(2, -1))
        ready.append((label, objective, optimizer, one, two))
    found: dict[str, list[tuple[float, float, float]]] = {label: [] for label, *_ in ready}
    for _ in range(turns + 1):
        for label, objective, optimizer, one, two in ready:
            at_once = seconds(device, step, objective, one, optimizer)
            accumulated = seconds(device, step, objective, two, optimizer)
            with torch.no_grad():
                found[label].append((at_once, accumulated, seconds(device, objective.latents, one)))
    base = found[BASELINE][1:]  # the first turn warms up
    print(f"{BASELINE}: {1e3 * statistics.median(turn[0] for turn in base):.1f} ms a step of {batch} on {device.type}")

    def ratio(label: str, which: int, to: int) -> float:
        return statistics.median(mine[which] / plain[to] for mine, plain in zip(found[label][1:], base, strict=True))

    return {label: [ratio(label, 0, 0), ratio(label, 1, 1), ratio(label, 2, 0)] for label in found}


def count_bytes(rank: int, port: int, batch: int, queue: Any) -> None:
    """One of two processes: puts {label: bytes this rank sends into collectives in a step} into the queue."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    sent = 0

    def counted(collective: Callable[..., Any], which: int) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal sent
            sent += arguments[which].numel() * arguments[which].element_size()
            return collective(*arguments, **more)

        return call

    dist.all_reduce = counted(dist.all_reduce, 0)
    dist.all_gather_into_tensor = counted(dist.all_gather_into_tensor, 1)
    dist.reduce_scatter_tensor = counted(dist.reduce_scatter_tensor, 1)
    torch.set_num_threads(1)
    world, device = World(rank, 2), torch.device("cpu")
    found = {}
    for label, name, settings in candidates():
        objective = build(name, settings, world, device)
        batches = micros(objective.streams, torch.from_numpy(world.positions(0, batch)))
        sent = 0
        step(objective, batches)
        found[label] = (sent, 4 * sum(parameter.numel() for parameter in objective.parameters()))
    if rank == 0:
        queue.put(found)
    dist.destroy_process_group()


def communication(batch: int) -> dict[str, tuple[int, int]]:
    """For every candidate the bytes that a rank of two sends in a step besides the gradients, and those of these."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = get_context("spawn").SimpleQueue()
    start_processes(count_bytes, (port, batch, queue), nprocs=2)
    found: dict[str, tuple[int, int]] = queue.get()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    told = parser.parse_args()
    torch.set_num_threads(1)  # threads that wait for each other count as work
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ratios, sent = times(told.batch, told.turns, device), communication(told.batch)
    print("\n| objective | step | accumulated | report | own bytes a step | gradient bytes a step |")
    print("|---|---|---|---|---|---|")
    for label, (whole, accumulated, report) in ratios.items():
        own, gradient = sent[label]
        print(f"| `{label}` | {whole:.2f} | {accumulated:.2f} | {report:.2f} | {own:,} | {gradient:,} |")


if __name__ == "__main__":
    main()
