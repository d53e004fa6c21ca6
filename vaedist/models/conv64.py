"""The 64x64 network of FactorVAE for CelebA, 3D Shapes and 3D Chairs (Kim & Mnih 2018, appendix A, Table 2)."""

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
    hidden: int = bounded(256, at_least=1)  # 128 for dSprites

    def build(self, shape: tuple[int, int, int], world: World) -> VAE:
        require_size("conv64", 64, shape)
        encoder = Sequential(
            Down(shape[0], 32), nn.ReLU(),
            Down(32, 32), nn.ReLU(),
            Down(32, 64), nn.ReLU(),
            Down(64, 64), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, self.hidden), nn.ReLU(),
            WideLinear(self.hidden, 2 * self.latent),
        )  # fmt: skip
        decoder = Sequential(
            nn.Linear(self.latent, self.hidden), nn.ReLU(),
            nn.Linear(self.hidden, 64 * 4 * 4), nn.ReLU(),
            nn.Unflatten(1, (64, 4, 4)),
            Up(64, 64), nn.ReLU(),
            Up(64, 32), nn.ReLU(),
            Up(32, 32), nn.ReLU(),
            Up(32, shape[0]),
        )  # fmt: skip
        return VAE(encoder, decoder, latent=self.latent)
