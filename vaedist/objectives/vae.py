"""The variational autoencoder (Kingma & Welling 2014, eq. 10)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vaedist import objectives
from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.world import World


@dataclass(frozen=True, kw_only=True)
class Config(objectives.Config):
    def build(self, vae: VAE, world: World) -> "ELBO":
        return ELBO(self, vae, world)


class ELBO(objectives.Objective):
    """loss = recon + kl"""

    def forward(self, images: Tensor, noise: Noise, surveyed: Any) -> dict[str, Tensor]:
        recon, kl, _ = self.negative_elbo(images[0], noise)
        return {"loss": recon + kl, "recon": recon, "kl": kl}
