"""Diagonal Gaussians: pure functions of mu and logvar, [batch, latent] each, in nats."""

import torch
from torch import Tensor


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) of every latent, [batch, latent] (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


def sample(mu: Tensor, logvar: Tensor, normal: Tensor) -> Tensor:
    """The reparameterised draw z = mu + sigma * normal."""
    return mu + torch.exp(0.5 * logvar) * normal
