"""One rank of a launched test in which the last rank alone goes wrong, once.

`faults.py DATA OUT` makes every fault in turn, rank 0 writes OUT/found.json, and then it is a run of train.py under the
first.
"""

import json
import os
import runpy
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cases
import torch

from vaedist import backend, trainer
from vaedist.objectives import Objective
from vaedist.objectives.vae import ELBO

TRAIN = Path(__file__).parents[1] / "vaedist" / "train.py"
STEP = 4  # the one that goes wrong
STEADY = 3  # steps until the loss scale grows
QUIET = {"train_steps": 8, "track_every": 5, "evaluate_every": 100, "checkpoint_every": 100}
NAN = torch.tensor(float("nan"))


def ulp(objective: Objective, result: None) -> None:
    """The smallest possible change of one number in two tensors of the discriminator."""
    for name in ("2.bias", "0.weight"):
        bits = objective.discriminator.get_parameter(name).detach().view(torch.int32).view(-1)
        bits[bits.bitwise_and(2**23 - 1).argmax()] += 1  # far above a power of two: a step does not round it away


# The method that goes wrong, what it then returns instead of its result, the case and how it runs.
FAULTS: dict[str, tuple[type, str, Any, str, dict[str, object]]] = {
    "latents": (Objective, "posterior", lambda _, q: type(q)(*(latent * NAN for latent in q)), "vae", {}),
    "term": (ELBO, "forward", lambda _, terms: terms | {"kl": terms["kl"] * NAN}, "vae", {}),
    "report": (Objective, "_everything", lambda _, found: (found[0]._replace(z=found[0].z * NAN), found[1]), "vae",
               {"track_every": STEP}),
    # 0, and its gradient is 0 / 0: only a look at the weights tells before they are saved
    "gradient": (Objective, "recon", lambda _, recon: recon + (0 * recon).sqrt(), "vae", {"checkpoint_every": STEP}),
    "overflow": (Objective, "recon", lambda _, recon: recon + (0 * recon).sqrt(), "vae",
                 {"train_precision": "fp16", "track_every": 1, "checkpoint_every": 1, "checkpoint_keep": 100}),
    "ulp": (Objective, "after_step", ulp, "factorvae", {"debug_replicas": STEP + 1}),
}  # fmt: skip


class Fault(ExitStack):
    """While it is entered, one method goes wrong in step STEP on the last rank."""

    def __init__(self, name: str) -> None:
        super().__init__()
        kind, method, spoil, self.case, self.settings = FAULTS[name]
        self.steps, original, micros = 0, getattr(kind, method), trainer.Session.micros
        last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1

        def count(*arguments: Any) -> Any:
            self.steps += 1
            return micros(*arguments)

        def changed(objective: Objective, *arguments: Any) -> Any:
            result = original(objective, *arguments)
            return spoil(objective, result) if last and self.steps == STEP else result

        self.enter_context(patch.object(trainer.Session, "micros", count))
        self.enter_context(patch.object(kind, method, changed))


def everything(data: Path, out: Path) -> None:
    """Every rank's end under every fault: what was raised, how many steps were taken, whether anything was saved."""
    found: dict[str, Any] = {}
    world = backend.Backend(backend.Config()).world
    for name in FAULTS:
        with Fault(name) as fault:
            error, directory = "", out / name
            try:
                cases.run(fault.case, data, directory, **QUIET | fault.settings)
            except trainer.USER_ERRORS as caught:
                error = f"{type(caught).__name__}: {caught}"
            found[name] = world.everyone((error, fault.steps, (directory / "checkpoints").exists()))
    for precision in ("fp16", "bf16"):
        cases.run("betatcvae", data, out / f"betatcvae-{precision}", train_precision=precision)
    cases.run("betatcvae", data, out / "moved", train_precision="fp16")
    if world.rank == 0:
        (out / "found.json").write_text(json.dumps({"world_size": world.size, "faults": found}))
    world.everyone(None)


if __name__ == "__main__":
    data, out = map(Path, sys.argv[1:])
    backend.STEADY = STEADY
    everything(data, out)
    with Fault("latents"):
        sys.argv = [str(TRAIN), *cases.words("vae", data, out / "launched", **QUIET)]
        runpy.run_path(str(TRAIN), run_name="__main__")
