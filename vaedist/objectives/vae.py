"""The variational autoencoder (Kingma & Welling 2014, eq. 10)."""

from dataclasses import dataclass

from torch import Tensor

from vaedist import objectives
from vaedist.gaussian import Posterior
from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.world import World


@dataclass(frozen=True, kw_only=True)
class Config(objectives.Config):
    def build(self, vae: VAE, world: World, images: int) -> "ELBO":
        return ELBO(self, vae, world, images)


class ELBO(objectives.Objective):
    """loss = recon + kl"""

    def regularizer(self, q: Posterior, noise: Noise, step: Tensor) -> dict[str, Tensor]:
        return {"regularizer": q.kl().sum(1).mean()}
