"""The runs whose losses are held in golden/, the same for the test process and for the workers it launches."""

import json
from pathlib import Path

from vaedist.backend import Backend
from vaedist.config import available
from vaedist.recipe import load
from vaedist.trainer import train

STEPS, BATCH = 20, 16
CASES = {name: [f"objective.name={name}"] for name in available("vaedist.objectives")} | {
    "conv128": ["model.name=conv128", "model.hidden=32", "data.size=128", "objective.likelihood=gaussian"]
}
CASES["factorvae"].append("objective.discriminator.width=64")
COUPLED = {"conv128"}       # batch normalisation: accumulation changes the statistics, and so the run


def words(case: str, data: Path, run: Path, *more: str) -> list[str]:
    """The command line of a case."""
    told = {word.partition("=")[0] for word in more}
    common = {
        "recipe": "celeba64",
        "data.shards": data,
        "data.crop": "null",
        "data.flip": "true",
        "data.cache": data.parent / "cache",
        "optimizer.lr": "1e-3",
        "train.steps": STEPS,
        "train.batch": BATCH,
        "checkpoint.every": 10,
        "evaluate.every": 10,
        "evaluate.names": "[elbo]",
        "track.every": 1,
        "track.wandb": "off",
        "run": run,
    }
    return [f"{key}={value}" for key, value in common.items() if key not in told] + CASES[case] + list(more)


def run(case: str, data: Path, directory: Path, *more: str):
    """Trains a case in this process (one of several, perhaps); returns the objective."""
    recipe, _ = load(words(case, data, directory, *more))
    backend = Backend(precision=recipe.train.precision, accumulate=recipe.train.accumulate)
    return train(recipe, backend)


def rows(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> list[float]:
    """The loss of every step, in order; a gap or a duplicate is an error."""
    found = rows(directory)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    assert [row["seen"] for row in found] == [BATCH * (i + 1) for i in range(len(found))]
    return [row["train/loss"] for row in found]
