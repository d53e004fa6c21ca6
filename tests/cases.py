"""The runs whose losses golden/losses.json holds, the same in the test process and in the workers it launches.

`./run python tests/cases.py` writes golden/losses.json anew; the commit that does so says why it had to change.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_model import Config as Tiny

from shards.packing.pack import pack_celeba
from vaedist.backend import Backend
from vaedist.config import available
from vaedist.objectives import Objective
from vaedist.recipe import load
from vaedist.stop import Stop
from vaedist.trainer import train

GOLDEN = Path(__file__).with_name("golden") / "losses.json"
BATCH = 16
COMMON = {
    "recipe": "celeba64",
    "data.crop": "null",
    "data.flip": "true",
    "optimizer.lr": "5e-4",
    "train.steps": "12",
    "train.batch": str(BATCH),
    "checkpoint.every": "6",
    "evaluate.every": "12",
    "evaluate.names": "[elbo]",
    "track.every": "1",
    "debug.replicas": "4",
    "track.wandb": "off",
}
CASES = {name: {"objective": name} for name in available("vaedist.objectives")}
CASES["factorvae"]["objective.discriminator.width"] = "64"
CASES["annealedvae"]["objective.steps"] = "8"
CASES["constrainedvae"] |= {"objective.bound": "0.2", "objective.rate": "0.5"}
CASES["constrainedvae-recon"] = {
    "objective": "constrainedvae",
    "objective.constrained": "recon",
    "objective.bound": "8600",
    "objective.rate": "1e-3",
}
CASES["betatcvae-mss"] = {"objective": "betatcvae", "objective.sampling": "mss"}
CASES["qlae"]["optimizer.lr"] = "2e-3"  # a slower one leaves all images with one code
CASES["dipvae-ii"] = {"objective": "dipvae", "objective.kind": "ii"}
CASES["conv64"] = CASES["factorvae"] | {"model": "conv64"}
CASES["conv128"] = {
    "model": "conv128",
    "model.hidden": "32",
    "data.size": "128",
    "objective.likelihood": "gaussian",
    "train.steps": "6",
    "checkpoint.every": "3",
}
TINY = [case for case in CASES if "model" not in CASES[case]]
COUPLED = {"conv128"}  # batch normalisation: accumulation changes the statistics, and so the run


def words(case: str, data: Path, run: Path, **more: object) -> list[str]:
    """The command line of a case; `train_precision` in `more` stands for train.precision."""
    places = {"data.shards": data, "data.cache": data.parent / "cache", "run": run}
    told = {key.replace("_", ".", 1): value for key, value in more.items()}
    return [f"{key}={value}" for key, value in (COMMON | CASES[case] | places | told).items()]


def run(case: str, data: Path, directory: Path, **more: object) -> Objective:
    """Trains a case in this process, which may be one of several; one that names no model trains the tiny one."""
    recipe, _ = load(words(case, data, directory, **more))
    if case in TINY:
        recipe = replace(recipe, model=Tiny())
    return train(recipe, Backend(recipe.train), Stop())


def rows(directory: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def terms(directory: Path) -> dict[str, list[float]]:
    """Every term that all steps have, the loss among them; a gap or a duplicate in the steps is an error."""
    found = rows(directory)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    assert [row["seen"] for row in found] == [BATCH * (i + 1) for i in range(len(found))]
    return {
        name: [row[name] for row in found]
        for name in found[0]
        if name.startswith(("train/", "latent/")) and "kl_" not in name and all(name in row for row in found)
    }


def pack_discs(directory: Path, *, train: int = 50, valid: int = 13) -> None:
    """Coloured discs on coloured slopes, drawn in integers: the same bytes with every version of every library."""
    source = directory.with_name(f"{directory.name}.source")
    (source / "img_align_celeba").mkdir(parents=True)
    names = [f"{number:06d}.jpg" for number in range(1, train + valid + 1)]
    y, x = np.mgrid[:80, :80]
    for number, name in enumerate(names, 1):
        colours = [[number * k % 256 for k in ks] for ks in ((37, 59, 83), (101, 29, 67))]
        slope = (np.array(colours[0]) * (x + number * y % 160)[..., None]) // 240
        inside = (x - 20 - number * 7 % 40) ** 2 + (y - 20 - number * 11 % 40) ** 2 < (8 + number % 9) ** 2
        pixels = np.where(inside[..., None], colours[1], slope % 256).astype(np.uint8)
        Image.fromarray(pixels).save(source / "img_align_celeba" / name, quality=95)
    attributes = "".join(f"{name} {1 - 2 * (i % 2)}\n" for i, name in enumerate(names))
    (source / "list_attr_celeba.txt").write_text(f"{len(names)}\nSmiling\n{attributes}")
    partition = "".join(f"{name} {int(i >= train)}\n" for i, name in enumerate(names))
    (source / "list_eval_partition.txt").write_text(partition)
    pack_celeba(source, directory, workers=1, quiet=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "set"
        pack_discs(data)
        golden = {}
        for case in CASES:
            run(case, data, Path(folder) / case, train_precision="fp64")
            golden[case] = terms(Path(folder) / case)
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
