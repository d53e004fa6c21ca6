"""The 64x64 network of FactorVAE for CelebA, 3D Shapes and 3D Chairs (Kim & Mnih 2018, appendix A, Table 2)."""

from dataclasses import dataclass

from torch import nn

from vaedist.config import bounded
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
            nn.Conv2d(shape[0], 32, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 32, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 4, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, self.hidden), nn.ReLU(),
            WideLinear(self.hidden, 2 * self.latent),
        )  # fmt: skip
        decoder = Sequential(
            nn.Linear(self.latent, self.hidden), nn.ReLU(),
            nn.Linear(self.hidden, 64 * 4 * 4), nn.ReLU(),
            nn.Unflatten(1, (64, 4, 4)),
            nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(32, 32, 4, stride=2, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(32, shape[0], 4, stride=2, padding=1),
        )  # fmt: skip
        return VAE(encoder, decoder, latent=self.latent)
