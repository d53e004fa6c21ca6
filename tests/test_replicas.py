"""Several runs at once in one process: each is the run trained alone, in its own directory."""

from dataclasses import replace

import cases
import pytest
from tiny_model import Config as Tiny

from vaedist.recipe import load_all
from vaedist.replicas.backend import ReplicaBackend
from vaedist.replicas.run import train_replicas
from vaedist.stop import Stop

SHORT = {"train_precision": "fp64", "train_steps": 4, "checkpoint_every": 2, "evaluate_every": 4}
LISTS = {
    "factorvae": {"objective_gamma": "[10,20,40]", "objective_discriminator.lr": "[1e-5,1e-4,1e-4]"},
}


def at_once(case, data, runs, **more):
    """Trains a run for each directory."""
    words = cases.words(case, data, f"[{','.join(map(str, runs))}]", train_replicas=len(runs), **SHORT | more)
    recipes = [replace(recipe, model=Tiny()) for recipe in load_all(words)[0]]
    train_replicas(recipes, ReplicaBackend(recipes[0].train), Stop())


def alone(case, data, run, number, **more):
    """Trains the run that replica `number` is."""
    settings = {
        key: value.strip("[]").split(",")[number] if "[" in str(value) else value for key, value in more.items()
    }
    return cases.run(case, data, run, **SHORT | {"seed": number} | settings)


def same(first, second):
    for one, other in zip(cases.rows(first), cases.rows(second), strict=True):
        assert one.keys() == other.keys()
        assert {k: v for k, v in one.items() if "perf" not in k} == pytest.approx(
            {k: v for k, v in other.items() if "perf" not in k}, rel=1e-9
        )


def test_it(data, tmp_path):
    runs = [tmp_path / name for name in "abc"]
    at_once("factorvae", data, runs, **LISTS["factorvae"])
    for number, run in enumerate(runs):
        alone("factorvae", data, tmp_path / "alone" / run.name, number, **LISTS["factorvae"])
        same(run, tmp_path / "alone" / run.name)
