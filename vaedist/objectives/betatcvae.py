"""beta-TCVAE (Chen et al. 2018, eq. 4)."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vaedist import objectives
from vaedist.aggregate import decompose, stratified, weighted
from vaedist.config import bounded
from vaedist.gaussian import Posterior
from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.world import World


@dataclass(frozen=True, kw_only=True)
class Config(objectives.Config):
    beta: float = bounded(6.0, at_least=0)
    alpha: float = bounded(1.0, at_least=0)
    gamma: float = bounded(1.0, at_least=0)
    sampling: Literal["mws", "mss"] = "mws"  # how q(z) is estimated: minibatch-weighted or minibatch-stratified

    def build(self, vae: VAE, world: World, images: int) -> "BetaTCVAE":
        return BetaTCVAE(self, vae, world, images)


class BetaTCVAE(objectives.Objective):
    """loss = recon + alpha * mi + beta * tc + gamma * dwkl

    The paper takes all expectations at the draws of z; here mi is what tc and dwkl leave of the analytic kl, which has
    the same mean and less noise (see `aggregate.decompose`).
    """

    couples_rows = True

    def __init__(self, config: Config, vae: VAE, world: World, images: int) -> None:
        super().__init__(config, vae, world, images)
        self.alpha, self.beta, self.gamma = config.alpha, config.beta, config.gamma
        self.weights = weighted if config.sampling == "mws" else stratified

    def require_batch(self, batch: int) -> None:
        super().require_batch(batch)
        self.weights(batch, self.images)

    def regularizer(self, q: Posterior, noise: Noise, step: Tensor) -> dict[str, Tensor]:
        mi, tc, dwkl = decompose(q, noise, self.world, self.weights, self.images)
        return {
            "regularizer": self.alpha * mi + self.beta * tc + self.gamma * dwkl,
            "mi": mi,
            "tc": tc,
            "dwkl": dwkl,
        }
