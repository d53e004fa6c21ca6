"""beta-VAE (Higgins et al. 2017, eq. 4)."""

from dataclasses import dataclass

from torch import Tensor

from vaedist import objectives
from vaedist.config import bounded
from vaedist.gaussian import Posterior
from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.world import World


@dataclass(frozen=True, kw_only=True)
class Config(objectives.Config):
    beta: float = bounded(4.0, at_least=0)
    warmup: int = bounded(0, at_least=0)  # steps in which beta rises from 0

    def build(self, vae: VAE, world: World, images: int) -> "BetaVAE":
        return BetaVAE(self, vae, world, images)


class BetaVAE(objectives.Objective):
    """loss = recon + beta(step) * kl"""

    def __init__(self, config: Config, vae: VAE, world: World, images: int) -> None:
        super().__init__(config, vae, world, images)
        self.beta, self.warmup = config.beta, config.warmup

    def regularizer(self, q: Posterior, noise: Noise, step: Tensor) -> dict[str, Tensor]:
        beta = self.beta * ((step + 1) / max(1, self.warmup)).clamp(max=1)
        return {"regularizer": beta * q.kl().sum(1).mean()}
