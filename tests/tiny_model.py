"""A VAE small enough to train in half precision on a CPU without instructions for it, and how to train it."""

from dataclasses import dataclass, replace
from pathlib import Path

import cases
from torch import nn

from vaedist.backend import Backend
from vaedist.layers import Sequential, WideLinear
from vaedist.models import VAE
from vaedist.objectives import Objective
from vaedist.recipe import load
from vaedist.trainer import train
from vaedist.world import World


@dataclass(frozen=True, kw_only=True)
class Config:
    latent: int = 10

    def build(self, shape: tuple[int, int, int], world: World) -> VAE:
        """Reads images [3, 64, 64]."""
        encoder = Sequential(
            nn.Conv2d(3, 16, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(),
            WideLinear(64, 2 * self.latent),
        )  # fmt: skip
        decoder = Sequential(
            nn.Linear(self.latent, 64), nn.ReLU(), nn.Linear(64, 1024), nn.ReLU(), nn.Unflatten(1, (16, 8, 8)),
            nn.ConvTranspose2d(16, 3, 8, stride=8),
        )  # fmt: skip
        return VAE(encoder, decoder, latent=self.latent)


def run(case: str, data: Path, directory: Path, **more: object) -> Objective:
    """`cases.run` with this model."""
    recipe = replace(load(cases.words(case, data, directory, **more))[0], model=Config())
    return train(recipe, Backend(precision=recipe.train.precision, accumulate=recipe.train.accumulate))
