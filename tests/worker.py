"""One rank of a launched test: `worker.py everything|share DATA OUT` or `worker.py die DATA RUN CASE PRECISION`."""

import hashlib
import json
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import cases
import torch
from small import micro_batches, small, step

from vaedist import backend
from vaedist.backend import Backend, Config
from vaedist.console import Console
from vaedist.layers import BatchNorm2d
from vaedist.noise import Noise
from vaedist.world import World


def everything(data: Path, out: Path) -> None:
    """Every case in both precisions, resumed runs, and the world's own methods; rank 0 writes OUT/found.json."""
    opened = Backend(Config())
    world = opened.world
    found: dict[str, object] = {"world_size": world.size, "equal_parameters": {}}
    for case in cases.CASES:
        for precision in ("fp64", "fp32"):
            directory = out / f"{case}-{precision}"
            objective = cases.run(case, data, directory, train_precision=precision)
            weights = torch.cat([p.detach().flatten() for p in objective.parameters()]).numpy().tobytes()
            copies = world.everyone(hashlib.sha256(weights).hexdigest())
            found["equal_parameters"][f"{case}-{precision}"] = len(set(copies)) == 1
        if world.size > 2:  # two processes show the rest as well, in less time
            continue
        resumed = out / f"{case}-resumed"
        if world.rank == 0:
            (resumed / "checkpoints").mkdir(parents=True)
            half = min((directory / "checkpoints").iterdir())
            shutil.copytree(half, resumed / "checkpoints" / half.name)
            shutil.copy(directory / "metrics.jsonl", resumed)
        world.everyone(None)
        cases.run(case, data, resumed, train_precision="fp32")
        more = {"train_accumulate": 2 if case not in cases.COUPLED else 1}
        for precision in ("fp64", "fp32"):
            cases.run(case, data, out / f"{case}-{precision}-moved", train_precision=precision, **more)
    found |= methods(world)
    if world.rank == 0:
        (out / "found.json").write_text(json.dumps(found))
    if hasattr(os, "SCHED_IDLE"):
        starve_threads(world.rank)
    world.everyone(None)
    opened.close()


def starve_threads(rank: int) -> None:
    """Makes all threads but this one late, as on a busy machine: an end that does not wait for them shows."""
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[rank % len(cpus)]})
    for thread in (int(path.name) for path in Path("/proc/self/task").iterdir()):
        if thread != os.getpid():
            os.sched_setaffinity(thread, {cpus[rank % len(cpus)]})
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))


def share(data: Path, out: Path) -> None:
    """Every case in float32, by gloo where there is a GPU too: two processes on one GPU are what NCCL refuses."""
    backend.InitProcessGroupKwargs = partial(backend.InitProcessGroupKwargs, backend="gloo")
    opened = Backend(Config())
    for case in cases.CASES:
        cases.run(case, data, out / case)
    opened.close()


def methods(world: World) -> dict[str, object]:
    """What the world's methods and batch normalisation give here, for comparison with one process."""
    torch.manual_seed(0)
    x = torch.randn(12, 5, 3, 3, dtype=torch.float64)
    target = torch.randn_like(x)
    own = torch.arange(12).chunk(world.size)[world.rank]

    leaf = x[own].requires_grad_()
    rows = leaf.flatten(1)
    everyone = world.gather(rows)
    local = (rows[:, None] - everyone[None]).square().sum(-1).cos().sum(1).mean()
    local.backward()
    # the mean over ranks, which DDP takes of parameters' gradients
    result = {
        "gather": (world.gather(leaf.grad) / world.size).tolist(),
        "gather_loss": world.mean(local.detach()).item(),
    }

    layer = BatchNorm2d(5, world).double()
    leaf = x[own].requires_grad_()
    ((layer(leaf) * target[own]).square().flatten(1).sum(1).mean()).backward()
    result["batch_norm"] = (world.gather(leaf.grad) / world.size).tolist()
    result["batch_norm_weight"] = world.mean(layer.weight.grad).tolist()
    result["running_var"] = layer.running_var.tolist()

    z = x[:, :, 0, 0]
    positions = torch.from_numpy(world.positions(100, 12, accumulate=3))
    permuted = world.permute_dims(z[positions - 100], Noise(5, positions))
    result["permuted"] = world.step_rows(permuted).tolist()

    # a coupled objective over batch normalisation in three micro-batches of four rows, of which these are this rank's
    objective = small("betatcvae", "batch norm", world)
    micros = [
        (images.chunk(world.size, 1)[world.rank], Noise(noise.seed, noise.positions.chunk(world.size)[world.rank]))
        for images, noise in micro_batches(1, parts=3)
    ]
    result["accumulated_loss"] = world.mean(step(objective, micros)["loss"]).item()
    for name, parameter in objective.named_parameters():
        result[f"accumulated_{name}"] = world.mean(parameter.grad).tolist()
    for name, buffer in objective.named_buffers():
        result[f"accumulated_{name}"] = buffer.tolist()
    return result


def die(data: Path, run: Path, case: str, precision: str) -> None:
    """A case whose last rank is killed between the steps 8 and 9."""
    world = Backend(Config()).world
    taken = 0

    def step(self: Console) -> None:
        nonlocal taken
        taken += 1
        if taken == 8 and world.rank == world.size - 1:
            while not (run / "checkpoints" / "step-00000006").exists():  # it is written beside the steps
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    Console.step = step
    cases.run(case, data, run, train_precision=precision)


if __name__ == "__main__":
    what, data, out, *rest = sys.argv[1:]
    {"everything": everything, "share": share, "die": die}[what](Path(data), Path(out), *rest)
