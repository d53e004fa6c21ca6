"""The divergences that FactorVAE and InfoVAE estimate from draws, against closed forms between Gaussians."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal

from vaedist.gaussian import Posterior, sample
from vaedist.noise import Noise
from vaedist.objectives import dipvae, factorvae, infovae
from vaedist.world import World

STEP = torch.zeros(())
SIGMA, CORRELATION = 0.5, 0.7


class Linear(nn.Module):
    """A VAE of images of two pixels, whose posterior means are Gaussian and correlated if the pixels are Gaussian."""

    latent, pixel_range, couples_rows = 2, (0.0, 1.0), False

    def __init__(self) -> None:
        super().__init__()
        self.correlation = nn.Parameter(torch.tensor(CORRELATION, dtype=torch.float64))

    def encode(self, images: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        first, second = images.flatten(1).unbind(1)
        second = self.correlation * first + (1 - self.correlation.square()).sqrt() * second
        mu = math.sqrt(1 - SIGMA**2) * torch.stack([first, second], dim=1)
        return mu, torch.full_like(mu, 2 * math.log(SIGMA))

    def decode(self, z: Tensor, noise: Noise) -> Tensor:
        return z[:, :, None, None]


class Optimal(nn.Module):
    """The logits log q(z) and log of the product of q(z_d), of a Gaussian whose variances are 1."""

    def __init__(self, correlation: float) -> None:
        super().__init__()
        covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
        self.joint = MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance)

    def forward(self, z: Tensor) -> Tensor:
        return torch.stack([self.joint.log_prob(z), Normal(0.0, 1.0).log_prob(z).sum(1)], dim=1)


def close(found: list[Tensor], truth: float, standard_errors: float = 4) -> bool:
    """Whether the mean is as near to the truth as chance allows."""
    values = torch.stack(found).detach()
    return bool((values.mean() - truth).abs() <= standard_errors * values.std() / len(values) ** 0.5)


def test_factorvaes_tc_is_the_closed_form_under_the_optimal_discriminator_and_so_is_its_gradient():
    r = (1 - SIGMA**2) * CORRELATION
    objective = factorvae.Config().build(Linear(), World(), 50)
    objective.discriminator = Optimal(r)
    values, slopes = [], []
    for seed in range(40):
        noise = Noise(seed, torch.arange(1000))
        pixels = torch.stack([noise.fork(name).normal("pixels", 2, torch.float64) for name in ("first", "second")])
        micro = pixels[..., None, None], noise
        with torch.no_grad():
            (surveyed,) = objective.survey([micro], STEP)
        tc = objective(*micro, STEP, surveyed)["tc"]
        values.append(tc)
        slopes += torch.autograd.grad(tc, objective.vae.correlation)
    assert close(values, -0.5 * math.log(1 - r**2))
    assert close(slopes, (1 - SIGMA**2) * r / (1 - r**2))


def mmd_draws(mean: float, deviation: float, *, batch: int = 8, repeats: int = 500) -> list[Tensor]:
    """Estimates of MMD^2(N(mean, deviation^2), N(0, 1)) in two dimensions by InfoVAE's own code."""
    objective = infovae.Config().build(Linear(), World(), 50)
    mu = torch.full((batch, 2), mean, dtype=torch.float64)
    logvar = torch.full_like(mu, 2 * math.log(deviation))
    found = []
    for seed in range(repeats):
        noise = Noise(seed, torch.arange(batch))
        z = sample(mu, logvar, noise.normal("latent", 2, torch.float64))
        found.append(objective.regularizer(Posterior(mu, logvar, z), noise, STEP)["mmd"])
    return found


def mean_kernel(distance: float, variance: float) -> float:
    """E exp(-|x - y|^2 / (2 b)) of independent Gaussians in b = 2 dimensions; variance: of one coordinate of x - y."""
    per_latent = math.sqrt(2 / (2 + variance)) * math.exp(-(distance**2) / (2 * (2 + variance)))
    return per_latent**2


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.8, 0.5)])
def test_the_mmd_is_without_bias_that_of_two_gaussians(mean, deviation):
    truth = mean_kernel(0, 2 * deviation**2) + mean_kernel(0, 2) - 2 * mean_kernel(mean, deviation**2 + 1)
    assert (truth == 0) == (mean == 0)
    batch = 8
    found = mmd_draws(mean, deviation, batch=batch)
    assert close(found, truth)
    # the V-statistic has each row's kernel with itself, 1, in the means over rows
    excess = sum(1 - mean_kernel(0, 2 * variance) for variance in (deviation**2, 1)) / batch
    assert not close([value + excess for value in found], truth)


def dip(kind: str) -> dipvae.DIPVAE:
    return dipvae.Config(kind=kind).build(Linear(), World(), 50)


@pytest.mark.parametrize("chunk", [8, 2**22])
@pytest.mark.parametrize(
    "build", [lambda: infovae.Config().build(Linear(), World(), 50), lambda: dip("i"), lambda: dip("ii")]
)
def test_the_gradient_of_a_regularizer_is_its_finite_difference(build, chunk, monkeypatch):
    monkeypatch.setattr("vaedist.aggregate.CHUNK", chunk)
    objective, noise = build(), Noise(0, torch.arange(5))

    def regularizer(mu: Tensor, logvar: Tensor, normal: Tensor) -> Tensor:
        return objective.regularizer(Posterior(mu, logvar, sample(mu, logvar, normal)), noise, STEP)["regularizer"]

    torch.manual_seed(0)
    latents = torch.randn(3, 5, 2, dtype=torch.float64).unbind()
    assert torch.autograd.gradcheck(regularizer, [latent.clone().requires_grad_() for latent in latents])
