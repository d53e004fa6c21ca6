"""The VAE under a constraint, on the KL or on the reconstruction, by ascent on its multiplier."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vaedist import objectives
from vaedist.config import bounded
from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.world import World

SMOOTHING = 0.99  # alpha of GECO's moving average, over some hundred steps
LIMITS = 1e-3, 1e3  # of GECO's multiplier


@dataclass(frozen=True, kw_only=True)
class Config(objectives.Config):
    constrained: Literal["kl", "recon"] = "kl"
    bound: float | None = None  # nats per image; null: 25 of kl (the last capacity of Burgess et al. 2018)
    rate: float = bounded(1e-4, above=0)  # of the multiplier, or of its logarithm, per step and nat beyond the bound
    multiplier: float = bounded(1.0, above=0)  # at the start; 1 is the plain VAE

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = LIMITS
        if self.constrained == "recon" and self.bound is None:
            raise ValueError("constrained=recon needs a bound, in nats per image: that of a VAE's recon is a start")
        if self.constrained == "recon" and not low <= self.multiplier <= high:
            raise ValueError(f"multiplier={self.multiplier} of constrained=recon lies outside {low:g} to {high:g}")
        if self.constrained == "kl" and self.bound is not None and self.bound < 0:
            raise ValueError(f"bound={self.bound} on kl, which is never negative")

    def build(self, vae: VAE, world: World, images: int) -> "ConstrainedVAE":
        return ConstrainedVAE(self, vae, world, images)


class ConstrainedVAE(objectives.Objective):
    """loss = free + multiplier * (constrained - bound): the Lagrangian of min free subject to constrained <= bound.

    constrained = kl: recon is free. The multiplier ascends by the gradient of the Lagrangian, rate * (kl - bound), and
    stays at 0 or above; where it rests, it is the beta of the beta-VAE with that KL (Higgins et al. 2017, section 2,
    who derive beta from this constraint by the KKT conditions and then choose it by hand).

    constrained = recon: kl is free. GECO (Rezende & Viola 2018, Algorithm 1) multiplies the multiplier by
    exp(rate * average), with the moving average of recon - bound, which begins with the first batch's; where it rests,
    it is 1 / beta. The paper leaves the rate open and the multiplier unbounded. An untrained decoder is thousands of
    nats beyond the bound: here the multiplier stays within `LIMITS`, so that neither it nor the loss overflows and it
    comes back in time once the bound is met.

    Weights and multiplier move at once, the latter by the mean over the whole batch.
    """

    multiplier: Tensor
    average: Tensor

    def __init__(self, config: Config, vae: VAE, world: World, images: int) -> None:
        super().__init__(config, vae, world, images)
        self.constrained, self.rate = config.constrained, config.rate
        self.free = "recon" if config.constrained == "kl" else "kl"
        self.bound = 25.0 if config.bound is None else config.bound
        self.register_buffer("multiplier", torch.tensor(config.multiplier))
        if config.constrained == "recon":
            self.register_buffer("average", torch.tensor(torch.nan))  # of no step yet

    def forward(self, images: Tensor, noise: Noise, step: Tensor, surveyed: Any) -> dict[str, Tensor]:
        q = self.posterior(images[0], noise)
        terms = {"recon": self.recon(q.z, images[0], noise), "kl": q.kl().sum(1).mean()}
        loss = terms[self.free] + self.multiplier * (terms[self.constrained] - self.bound)
        return {"loss": loss} | terms | {"multiplier": self.multiplier.clone()}  # `after_step` changes it in place

    def after_step(self, terms: dict[str, Tensor]) -> None:
        excess = self.world.mean(terms[self.constrained]) - self.bound
        if self.constrained == "kl":
            self.multiplier.copy_((self.multiplier + self.rate * excess).clamp(min=0))
        else:
            average = excess.lerp(self.average.to(excess), SMOOTHING)
            self.average.copy_(torch.where(self.average.isnan(), excess, average))
            ascended = self.multiplier * torch.exp(self.rate * self.average)
            self.multiplier.copy_(ascended.clamp(*LIMITS))  # of infinity too
