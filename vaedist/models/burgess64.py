"""The 64x64 network of the disentangling literature (Burgess et al. 2018, section 4.1 and appendix)."""

from dataclasses import dataclass

from torch import nn

from vaedist.config import bounded
from vaedist.convolution import Down, Up
from vaedist.layers import Sequential, WideLinear
from vaedist.models import VAE, require_size
from vaedist.world import World


@dataclass(frozen=True, kw_only=True)
class Config:
    latent: int = bounded(10, at_least=1)

    def build(self, shape: tuple[int, int, int], world: World) -> VAE:
        require_size("burgess64", 64, shape)
        encoder = Sequential(
            Down(shape[0], 32), nn.ReLU(),
            Down(32, 32), nn.ReLU(),
            Down(32, 32), nn.ReLU(),
            Down(32, 32), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 256), nn.ReLU(),
            nn.Linear(256, 256), nn.ReLU(),
            WideLinear(256, 2 * self.latent),
        )  # fmt: skip
        decoder = Sequential(
            nn.Linear(self.latent, 256), nn.ReLU(),
            nn.Linear(256, 256), nn.ReLU(),
            nn.Linear(256, 32 * 4 * 4), nn.ReLU(),
            nn.Unflatten(1, (32, 4, 4)),
            Up(32, 32), nn.ReLU(),
            Up(32, 32), nn.ReLU(),
            Up(32, 32), nn.ReLU(),
            Up(32, shape[0]),
        )  # fmt: skip
        return VAE(encoder, decoder, latent=self.latent)
