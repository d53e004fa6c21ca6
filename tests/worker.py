"""One rank of a launched test: `worker.py DATA OUT run|die`; what it finds goes to OUT as JSON, written by rank 0."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from tests import cases
from vaedist.backend import Backend
from vaedist.console import Console
from vaedist.layers import BatchNorm2d
from vaedist.noise import Noise
from vaedist.world import World


def everything(data: Path, out: Path) -> None:
    """Every case in both precisions, a resumed run of each, and the world's own methods."""
    world = Backend(precision="fp32", accumulate=1).world
    found: dict[str, object] = {"world_size": world.size, "equal_parameters": {}}
    for case in cases.CASES:
        for precision in ("fp64", "fp32"):
            directory = out / f"{case}-{precision}"
            objective = cases.run(case, data, directory, f"train.precision={precision}")
            weights = torch.cat([p.detach().flatten() for p in objective.parameters()]).double().numpy().tobytes()
            found["equal_parameters"][f"{case}-{precision}"] = len(set(world.everyone(hash(weights)))) == 1
        resumed = out / f"{case}-resumed"
        if world.rank == 0:
            (resumed / "checkpoints").mkdir(parents=True)
            shutil.copytree(directory / "checkpoints" / "step-00000010", resumed / "checkpoints" / "step-00000010")
            shutil.copy(directory / "metrics.jsonl", resumed)
        world.everyone(None)
        cases.run(case, data, resumed, "train.precision=fp32")
    if world.size == 2:
        cases.run("factorvae", data, out / "accumulated", "train.precision=fp64", "train.accumulate=4")
    found |= layers(world)
    if world.rank == 0:
        (out / "found.json").write_text(json.dumps(found))


def layers(world: World) -> dict[str, object]:
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
    result = {"gather": world.gather(leaf.grad).tolist(), "gather_loss": world.mean(local.detach()).item()}

    layer = BatchNorm2d(5, world).double()
    leaf = x[own].requires_grad_()
    ((layer(leaf) * target[own]).square().flatten(1).sum(1).mean()).backward()
    result["batch_norm"] = world.gather(leaf.grad).tolist()
    result["batch_norm_weight"] = world.mean(layer.weight.grad).tolist()
    result["running_var"] = layer.running_var.tolist()

    z = x[:, :, 0, 0]
    positions = torch.from_numpy(world.positions(100, 12, accumulate=3))
    permuted = world.permute_dims(z[positions - 100], Noise(5, positions))
    result["permuted"] = world._step_rows(permuted).tolist()
    return result


def die(data: Path, out: Path, case: str) -> None:
    """A case whose last rank is killed in the middle of step 13."""
    world = Backend(precision="fp64", accumulate=1).world
    taken = 0

    def step(self: Console) -> None:
        nonlocal taken
        taken += 1
        if taken == 12 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    Console.step = step
    cases.run(case, data, out / f"{case}-killed", "train.precision=fp64")


if __name__ == "__main__":
    what, data, out, *rest = sys.argv[1:]
    {"everything": everything, "die": die}[what](Path(data), Path(out), *rest)
