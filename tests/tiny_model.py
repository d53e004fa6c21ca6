"""A VAE small enough for many runs in a test, in half precision too."""

from dataclasses import dataclass

from torch import nn

from vaedist.layers import Sequential, WideLinear
from vaedist.models import VAE
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
