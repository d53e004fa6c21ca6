"""DIP-VAE I and II (Kumar et al. 2018, eq. 6 and 7)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vaedist import objectives
from vaedist.config import bounded
from vaedist.gaussian import Posterior
from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.world import World


@dataclass(frozen=True, kw_only=True)
class Config(objectives.Config):
    kind: Literal["i", "ii"] = "i"  # the covariance of the posterior means, or of z
    lambda_od: float = bounded(10.0, at_least=0)
    lambda_d: float | None = bounded(None, at_least=0)  # null: the paper's, 10 lambda_od for i, lambda_od for ii

    def build(self, vae: VAE, world: World, images: int) -> "DIPVAE":
        return DIPVAE(self, vae, world, images)


class DIPVAE(objectives.Objective):
    """loss = recon + kl + lambda_od * sum_{i != j} C_ij^2 + lambda_d * sum_i (C_ii - 1)^2

    C is the covariance over the whole batch (divided by B - 1), of mu for DIP-VAE-I, of z for DIP-VAE-II.
    """

    couples_rows = True

    def __init__(self, config: Config, vae: VAE, world: World, images: int) -> None:
        super().__init__(config, vae, world, images)
        self.second, self.lambda_od = config.kind == "ii", config.lambda_od
        ratio = 1 if self.second else 10
        self.lambda_d = ratio * config.lambda_od if config.lambda_d is None else config.lambda_d

    def regularizer(self, q: Posterior, noise: Noise, step: Tensor) -> dict[str, Tensor]:
        mean = self.world.mean(q.mu.mean(0))
        batch = self.world.size * len(q.mu)
        centred = q.mu - mean
        own = centred.T @ centred / (batch - 1)
        if self.second:
            own = own + q.logvar.exp().sum(0).diag() / batch
        covariance = self.world.sum(own)
        diagonal = (covariance.diag() - 1).square().sum()
        off_diagonal = (covariance - covariance.diag().diag()).square().sum()
        kl = q.kl().sum(1).mean()
        return {
            "regularizer": kl + self.lambda_od * off_diagonal + self.lambda_d * diagonal,
            "off_diagonal": off_diagonal,
            "diagonal": diagonal,
        }
