"""beta-VAE (Higgins et al. 2017, eq. 4)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vaedist import objectives
from vaedist.config import bounded
from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.world import World


@dataclass(frozen=True, kw_only=True)
class Config(objectives.Config):
    beta: float = bounded(4.0, at_least=0)

    def build(self, vae: VAE, world: World) -> "BetaVAE":
        return BetaVAE(self, vae, world)


class BetaVAE(objectives.Objective):
    """loss = recon + beta * kl"""

    def __init__(self, config: Config, vae: VAE, world: World) -> None:
        super().__init__(config, vae, world)
        self.beta = config.beta

    def forward(self, images: Tensor, noise: Noise, surveyed: Any) -> dict[str, Tensor]:
        recon, kl, _ = self.negative_elbo(images[0], noise)
        return {"loss": recon + self.beta * kl, "recon": recon, "kl": kl}
