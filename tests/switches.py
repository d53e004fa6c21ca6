"""One of two ranks: `switches.py DATA OUT`; compiled and watched runs, and at last a NaN on one rank alone."""

import json
import sys
from pathlib import Path

import cases
import torch

from vaedist import train
from vaedist.backend import Backend, Config
from vaedist.objectives import Objective

PROFILED = 2  # steps


def main(data: Path, out: Path) -> int:
    world = Backend(Config()).world
    found = {"world_size": world.size}
    cases.run("betatcvae", data, out / "compiled", train_compile="true")
    found["graphs"] = world.everyone(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    watched = {"train_steps": 8, "debug_profile": PROFILED, "debug_memory": "true", "debug_deterministic": "true"}
    cases.run("factorvae", data, out / "watched", **watched)
    if world.rank == 0:
        (out / "found.json").write_text(json.dumps(found))

    regularizer = Objective._regularizer

    def vanish(self, q, noise, step):
        terms = regularizer(self, q, noise, step)
        if step == 3 and world.rank == world.size - 1:
            terms["regularizer"] = terms["regularizer"] + (q.mu * 0).sqrt().sum() * 0
        return terms

    Objective._regularizer = vanish
    train.PATIENCE = 2.0
    return train.main(cases.words("vae", data, out / "anomaly", debug_anomaly="true"))


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
