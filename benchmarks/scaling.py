"""What more processes give: weak and strong scaling on this machine, and on paper for 8 to 1,024 GPUs.

    ./run python benchmarks/scaling.py [--turns 5] [OBJECTIVE]
    ./run python benchmarks/scaling.py --paper [OBJECTIVE]          the model alone

1, 2 and 4 processes of one thread take turns. Weak: 16 images on each; strong: 64 on all together. Where there are
fewer cores than processes these share them, and a time shows no more than what the processes cost each other.

The model adds up, of a step: the GPU's time, which is that of its arithmetic or of the host that launches its
operations, whichever is longer; the gradients' sum; what the objective gathers. It takes bytes and operations as they
are counted (tests/test_counts.py), and published figures until somebody measures: see the constants.
"""

import argparse
import math
import multiprocessing as mp
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from objectives import build, micros, step

from vaedist.gradients import Gradients
from vaedist.world import Vote, World

SIZES, ROWS, BATCH = (1, 2, 4), 16, 64
COLUMNS = ("scaling", "processes", "images on each", "ms a step", "ms of it in the sum", "images/s")
NUMBERS = (1, 23_000_000 // 4)  # of the sums that show latency and bandwidth here

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
LOCALS = (16, 64, 256, 1024, 4096)
NODE = 8  # GPUs
# Of a training step of 64 x 64 x 3 pixels through conv64, a stream of images (one more for FactorVAE's second batch)
FLOP = {"vae": 0.107e9, "factorvae": 0.206e9, "betatcvae": 0.107e9}  # an image, by torch.utils.flop_counter
OPERATIONS = {"vae": 148, "factorvae": 269, "betatcvae": 249}
GRADIENTS = {"vae": 3_065_180, "factorvae": 23_137_188, "betatcvae": 3_065_180}  # bytes
GATHERED = {"vae": (), "factorvae": (40,), "betatcvae": (128, 80)}  # bytes a row of each gather or its gradient
FLOPS = 67e12 / 2  # H100 SXM, float32, NVIDIA's data sheet; half of it: assumed
LAUNCH = 8e-6  # seconds of the host for an eager operation: assumed, 5 to 10 are usual
# NCCL's own model, src/graph/tuning.cc: seconds of a collective, of a hop by NVLink and of one by network
TREE, RING = (4.4e-6, 1.2e-6, 8.5e-6), (3.6e-6, 0.85e-6, 2.7e-6)  # LL128 for sums, LL for gathers
NVLINK = 370e9  # bytes/s that NCCL gets of an H100's 450 (NVIDIA/nccl-tests#212)
NETWORKS = {  # bytes/s of a node of 8
    "8 x 400 Gb/s": 8 * 47e9,  # InfiniBand NDR, a card for each GPU (NVIDIA/nccl-tests#290)
    "1 x 100 Gb/s": 0.9 * 12.5e9,  # 9/10 of the line rate: assumed
}
PAYS = 0.5  # efficiency below which the network does not


def sums(size: int, sent: float, node: float) -> float:
    """Seconds of a sum over `size` GPUs by a tree."""
    nodes = math.ceil(size / NODE)
    base, near, far = TREE
    latency = base + 2 * ((min(size, NODE) - 1) * near + math.log2(nodes) * far)
    return latency + 2 * sent / (NVLINK if nodes == 1 else min(NVLINK, node))


def gathers(size: int, rows: float, node: float) -> float:
    """Seconds of a gather of so many bytes in all, or of the sum that is its gradient, by a ring."""
    nodes = math.ceil(size / NODE)
    base, near, far = RING
    return base + (size - nodes) * near + (nodes - 1) * far + rows / (NVLINK if nodes == 1 else min(NVLINK, node))


def compute(objective: str, local: int) -> float:
    return max(local * FLOP[objective] / FLOPS, OPERATIONS[objective] * LAUNCH)


def efficiency(objective: str, local: int, size: int, node: float) -> float:
    """The share of a step in which a GPU computes: weak scaling, without overlap."""
    busy = compute(objective, local)
    sent = sums(size, GRADIENTS[objective], node)
    shared = sum(gathers(size, row * local * size, node) for row in GATHERED[objective])
    return busy / (busy + sent + shared)


def paper(objective: str) -> None:
    for name, node in NETWORKS.items():
        print(f"\n{objective}, nodes of {NODE} GPUs with {name}: efficiency in %\n")
        print(f"| images a GPU | compute ms | {' | '.join(map(str, GPUS))} | pays up to |\n|{'---|' * (len(GPUS) + 3)}")
        for local in LOCALS:
            found = {size: efficiency(objective, local, size, node) for size in GPUS}
            up_to = max((size for size in GPUS if found[size] >= PAYS), default="one GPU")
            cells = " | ".join(f"{100 * value:.0f}" for value in found.values())
            print(f"| {local} | {1e3 * compute(objective, local):.1f} | {cells} | {up_to} |")


def rank(number: int, size: int, objective: str, store: str, pipe: Connection) -> None:
    """One process: for every (rows, steps) that it is sent it answers the seconds of a step and those of its sum."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=size)
    world = World(number, size)
    model = build(objective, {}, world, torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.param_groups(), lr=1e-4, weight_decay=0.0, fused=True)
    gradients, vote, spent = Gradients(model.parameters(), world), Vote(world), [0.0]

    def average(*_: object) -> None:
        start = time.perf_counter()
        gradients.average()
        spent[0] += time.perf_counter() - start

    optimizer.register_step_pre_hook(average)
    while order := pipe.recv():
        rows, steps = order
        if steps:
            batches = micros(model.streams, torch.arange(rows)[None] + number * rows)
            spent[0], start = 0.0, time.perf_counter()
            for _ in range(steps):
                step(model, batches, optimizer)
                vote(0)
            pipe.send(((time.perf_counter() - start) / steps, spent[0] / steps))
        else:  # a sum of so many numbers
            numbers = torch.zeros(rows)
            start = time.perf_counter()
            dist.all_reduce(numbers)
            pipe.send((time.perf_counter() - start, 0.0))
    vote.close()
    dist.destroy_process_group()


def measure(objective: str, turns: int, folder: str) -> Iterator[str]:
    context = mp.get_context("fork")  # importing torch takes seconds
    pipes: dict[int, list[Connection]] = {size: [] for size in SIZES}
    processes = []
    for size in SIZES:
        for number in range(size):
            ours, theirs = context.Pipe()
            pipes[size].append(ours)
            arguments = (number, size, objective, f"{folder}/{size}", theirs)
            processes.append(context.Process(target=rank, args=arguments))
            processes[-1].start()

    def ask(size: int, *order: int) -> tuple[float, float]:
        """Of the slowest rank."""
        for pipe in pipes[size]:
            pipe.send(order)
        return max(pipe.recv() for pipe in pipes[size])

    orders = {(size, kind): ROWS if kind == "weak" else BATCH // size for size in SIZES for kind in ("weak", "strong")}
    found: dict[tuple[int, str], list[tuple[float, float]]] = {key: [] for key in orders}
    links: dict[int, list[list[float]]] = {size: [] for size in SIZES[1:]}
    for _ in range(turns + 1):
        for key, rows in orders.items():
            found[key].append(ask(key[0], rows, 2))
        for size, alone in links.items():
            alone.append([ask(size, numbers, 0)[0] for numbers in NUMBERS])
    for key, times in found.items():
        seconds, summed = (statistics.median(column) for column in zip(*times[1:], strict=True))
        size, kind = key
        cells = [kind, size, orders[key], f"{1e3 * seconds:.0f}", f"{1e3 * summed:.0f}"]
        yield f"| {' | '.join(map(str, [*cells, f'{size * orders[key] / seconds:.0f}']))} |"
    for size, alone in links.items():
        one, whole = (statistics.median(column) for column in zip(*alone[1:], strict=True))
        yield f"gloo, {size} processes: {1e3 * one:.2f} ms a sum of one number, {1e3 * whole:.0f} ms of 23 MB"
    for pipe in (pipe for group in pipes.values() for pipe in group):
        pipe.send(())
    for process in processes:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objective", nargs="?", default="factorvae", choices=list(OPERATIONS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--paper", action="store_true")
    told = parser.parse_args()
    if not told.paper:
        print(f"{told.objective} on {os.cpu_count()} cores\n")
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        with tempfile.TemporaryDirectory() as folder:
            for line in measure(told.objective, told.turns, folder):
                print(line)
    paper(told.objective)


if __name__ == "__main__":
    main()
