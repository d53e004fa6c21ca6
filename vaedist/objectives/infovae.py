"""InfoVAE with the maximum mean discrepancy (Zhao et al. 2019, section 3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vaedist import objectives
from vaedist.aggregate import by_rows
from vaedist.config import bounded
from vaedist.gaussian import Posterior
from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.world import World


@dataclass(frozen=True, kw_only=True)
class Config(objectives.Config):
    alpha: float = bounded(0.0, at_most=1)
    lambda_mmd: float = bounded(1000.0, at_least=0)
    bandwidth: float | None = bounded(None, above=0)  # of the kernel, squared; null: the number of latents

    def build(self, vae: VAE, world: World, images: int) -> "InfoVAE":
        return InfoVAE(self, vae, world, images)


class InfoVAE(objectives.Objective):
    """loss = recon + (1 - alpha) * kl + (alpha + lambda - 1) * mmd

    mmd is the unbiased estimate of MMD^2(q(z), p(z)) (Gretton et al. 2012, eq. 3) between the draws of the whole batch
    and as many from the prior, under the kernel exp(-|x - y|^2 / (2 bandwidth)); it may be negative.
    """

    couples_rows = True

    def __init__(self, config: Config, vae: VAE, world: World, images: int) -> None:
        super().__init__(config, vae, world, images)
        self.alpha, self.lambda_mmd = config.alpha, config.lambda_mmd
        self.bandwidth = config.bandwidth or float(vae.latent)

    def regularizer(self, q: Posterior, noise: Noise, step: Tensor) -> dict[str, Tensor]:
        prior = self.prior(noise, q.z.dtype)
        everyone, priors = self.world.gather_together(q.z, prior)
        batch = len(everyone)

        def others(x: Tensor, all_x: Tensor) -> Tensor:
            """The mean kernel of different rows: of each row with itself it is 1."""
            return (self.kernel(x, all_x).mean() * batch - 1) / (batch - 1)

        mmd = others(q.z, everyone) + others(prior, priors) - 2 * self.kernel(q.z, priors).mean()
        kl = q.kl().sum(1).mean()
        return {
            "regularizer": (1 - self.alpha) * kl + (self.alpha + self.lambda_mmd - 1) * mmd,
            "mmd": mmd,
        }

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean kernel of each x with all y: [rows, latent], [batch, latent] -> [rows]."""

        def compute(part: slice, x: Tensor, y: Tensor) -> Tensor:
            distance = (x[part, None] - y).square().sum(2)
            return torch.exp(distance / (-2 * self.bandwidth)).mean(1)

        return by_rows(compute, len(x), y.numel(), x, y)
