"""Diagonal Gaussians against torch.distributions."""

import torch
from torch.distributions import Normal, kl_divergence

from vaedist import gaussian

torch.manual_seed(0)
MU, LOGVAR, Z = torch.randn(3, 5, 4, dtype=torch.float64).unbind()
POSTERIOR = Normal(MU, (0.5 * LOGVAR).exp())


def test_kl_is_that_of_torch_distributions():
    torch.testing.assert_close(
        gaussian.kl(MU, LOGVAR), kl_divergence(POSTERIOR, Normal(0.0, 1.0)), rtol=1e-12, atol=1e-12
    )


def test_samples_are_mu_plus_sigma_times_the_noise():
    torch.testing.assert_close(gaussian.sample(MU, LOGVAR, Z), MU + POSTERIOR.scale * Z, rtol=1e-12, atol=1e-12)
