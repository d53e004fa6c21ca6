"""Diagonal Gaussians: functions of mu and logvar, [rows, latent] each, in nats."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of every latent, [rows, latent] (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


def sample(mu: Tensor, logvar: Tensor, normal: Tensor) -> Tensor:
    """The reparameterised draw z = mu + sigma * normal."""
    return mu + torch.exp(0.5 * logvar) * normal


class Posterior(NamedTuple):
    """q(z | x) of some rows, and a draw z of each, against the prior N(0, 1); [rows, latent] each."""

    mu: Tensor
    logvar: Tensor
    z: Tensor

    @property
    def mean(self) -> Tensor:
        return self.mu

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def kl(self) -> Tensor:
        """KL(q(z_d | x) || p(z_d)), [rows, latent]."""
        return kl(self.mu, self.logvar)

    def log_prior(self) -> Tensor:
        """log p(z_d) at the draw, [rows, latent]."""
        return -0.5 * (self.z.square() + LOG_2PI)

    def log_density(self, z: Tensor) -> Tensor:
        """log q(z_d | x) of each z under each row's posterior: [n, latent] -> [n, rows, latent]."""
        mu, logvar = self.mu.T.contiguous(), self.logvar.T.contiguous()  # sums over rows then run along memory
        standard = (z[:, :, None] - mu) * torch.exp(-0.5 * logvar)
        return (-0.5 * standard.square() - 0.5 * (logvar + LOG_2PI)).transpose(1, 2)
