"""A 128x128 network with batch normalisation and dropout; decodes by Tanh, so its pixels lie in [-1, 1]."""

from dataclasses import dataclass

from torch import nn

from vaedist.config import bounded
from vaedist.convolution import Down, Up
from vaedist.layers import BatchNorm2d, Dropout, Sequential, WideLinear
from vaedist.models import VAE, require_size
from vaedist.world import World


@dataclass(frozen=True, kw_only=True)
class Config:
    latent: int = bounded(32, at_least=1)
    hidden: int = bounded(4096, at_least=1)

    def build(self, shape: tuple[int, int, int], world: World) -> VAE:
        require_size("conv128", 128, shape)
        encoder = Sequential(
            Down(shape[0], 32), nn.LeakyReLU(0.2),
            Down(32, 64), BatchNorm2d(64, world), nn.LeakyReLU(0.2),
            Dropout(0.2, "encoder2"),
            Down(64, 128), BatchNorm2d(128, world), nn.LeakyReLU(0.2),
            Dropout(0.3, "encoder3"),
            Down(128, 256), nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(256 * 8 * 8, self.hidden), nn.LeakyReLU(0.2),
            WideLinear(self.hidden, 2 * self.latent),
        )  # fmt: skip
        decoder = Sequential(
            nn.Linear(self.latent, self.hidden), nn.LeakyReLU(0.2),
            nn.Linear(self.hidden, 256 * 8 * 8), nn.LeakyReLU(0.2),
            nn.Unflatten(1, (256, 8, 8)),
            Up(256, 128), BatchNorm2d(128, world), nn.LeakyReLU(0.2),
            Dropout(0.3, "decoder1"),
            Up(128, 64), BatchNorm2d(64, world), nn.LeakyReLU(0.2),
            Dropout(0.2, "decoder2"),
            Up(64, 32), nn.LeakyReLU(0.2),
            Up(32, shape[0]), nn.Tanh(),
        )  # fmt: skip
        return VAE(encoder, decoder, latent=self.latent, pixel_range=(-1.0, 1.0))
