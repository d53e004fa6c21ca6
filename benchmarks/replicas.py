"""What replicas cost: time of a training step of N of them at once as a ratio to that of one run alone.

    ./run python benchmarks/replicas.py [--replicas 16] [--batch 64] [--turns 10] [KEY=VALUE ...] [OBJECTIVE ...]

Both take turns in one process on random images of 64x64 pixels, by the backends that training has, on a GPU replayed as
CUDA graphs; KEY=VALUE are theirs, such as tf32=true or capture=false. A ratio is the median of the turns'. Below N
replicas are worth their while. On a CPU a time is that of all threads together.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from objectives import SHAPE, build, seconds
from torch import Tensor

from vaedist.backend import Backend
from vaedist.data.stream import Batch
from vaedist.graph import Replayed
from vaedist.meters import over_micros
from vaedist.noise import Noise
from vaedist.objectives import Objective
from vaedist.optimizer import Config as Optimizer
from vaedist.recipe import load
from vaedist.replicas.backend import ReplicaBackend
from vaedist.replicas.objective import ReplicaNoise, Replicas
from vaedist.world import World

CPU = torch.device("cpu")
Step = Callable[[], object]


def alone(name: str, batch: int, backend: Backend) -> Step:
    objective = build(name, {}, World(), CPU)
    model = backend.prepare(objective, Optimizer().build(objective.param_groups()), None)
    images = torch.rand(objective.streams, batch, *SHAPE, device=backend.device)
    return step(objective, model, backend, images, Noise(0, torch.arange(batch, device=backend.device)))


def at_once(name: str, batch: int, replicas: int, backend: ReplicaBackend) -> Step:
    objective = Replicas([build(name, {}, World(), CPU) for _ in range(replicas)], backend.device)
    optimizer = Optimizer().build(objective.param_groups([vars(Optimizer())] * replicas))
    model = backend.prepare(objective, optimizer, None)
    images = torch.rand(replicas, objective.streams, batch, *SHAPE, device=backend.device)
    positions = torch.arange(batch, device=backend.device)
    return step(objective, model, backend, images, ReplicaNoise(tuple(range(replicas)), positions, objective.which))


def step(
    objective: "Objective | Replicas", model: Callable[..., dict[str, Tensor]], backend: Backend, images: Tensor,
    noise: Noise,
) -> Step:  # fmt: skip
    """One step as the trainer makes it."""

    def take(batch: Batch, done: Tensor, measured: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with torch.no_grad(), backend.autocast():
            (surveyed,) = objective.survey([(batch.rows, noise)], done)  # type: ignore[list-item]
        with backend.accumulate(model):
            terms = model(batch.rows, noise, done, surveyed)
            backend.backward(terms["loss"])
            backend.step(1)
        means = over_micros([terms])
        objective.after_step(means)
        return means, {}

    replayed, batch = Replayed(take, backend, print), Batch(images, noise.positions)
    return lambda: replayed(batch, 0, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE or OBJECTIVE")
    parser.add_argument("--replicas", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=10)
    told = parser.parse_args()
    settings = [word for word in told.words if "=" in word]
    names = [word for word in told.words if "=" not in word] or ["vae", "factorvae"]
    config = load(["recipe=vae", *[f"train.{word}" for word in settings]])[0].train
    one, many = Backend(config), ReplicaBackend(config)
    if one.device.type == "cpu":
        torch.set_num_threads(1)  # threads that wait for each other count as work
    print(f"{one.describe()}, {' '.join(settings) or 'fp32'}, batch {told.batch}\n")
    print(f"| objective | one ms | {told.replicas} replicas ms | ratio |\n|---|---|---|---|")
    for name in names:
        steps = [alone(name, told.batch, one), at_once(name, told.batch, told.replicas, many)]
        turns = [[seconds(one.device, each) for each in steps] for _ in range(told.turns + 5)][5:]  # they warm up
        ratio = statistics.median(after / before for before, after in turns)
        before, after = (1e3 * statistics.median(times) for times in zip(*turns, strict=True))
        print(f"| `{name}` | {before:.2f} | {after:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
