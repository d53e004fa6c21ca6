"""The constrained VAE: its Lagrangian, the ascent on its multiplier, and a problem whose optimum is known."""

import math
from itertools import product

import pytest
import torch
from small import small
from torch import nn

from vaedist.layers import Sequential, WideLinear
from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.objectives import Objective, constrainedvae
from vaedist.objectives.constrainedvae import LIMITS, SMOOTHING, Config
from vaedist.world import World


def ascend(objective: Objective, *excesses: float) -> list[float]:
    """The multiplier after each step of these excesses over the bound, in nats."""
    multipliers = []
    for excess in excesses:
        objective.after_step({objective.constrained: torch.tensor(objective.bound + excess, dtype=torch.float64)})
        multipliers.append(objective.multiplier.item())
    return multipliers


def test_the_multiplier_of_the_kl_ascends_by_the_excess_and_is_never_negative():
    objective = small("constrainedvae", rate=0.1, bound=10.0)
    assert ascend(objective, 2.0, -4.0, -9.0, 1.0) == pytest.approx([1.2, 0.8, 0.0, 0.1], rel=1e-12)


def test_the_multiplier_of_geco_follows_the_moving_average():
    objective = small("constrainedvae", constrained="recon", rate=0.01, bound=8000.0, multiplier=2.0)
    averages = [5.0, SMOOTHING * 5 + (1 - SMOOTHING) * -20]
    averages.append(SMOOTHING * averages[1] + (1 - SMOOTHING) * 30)
    expected = [2 * math.exp(0.01 * sum(averages[: n + 1])) for n in range(3)]
    assert ascend(objective, 5.0, -20.0, 30.0) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_multiplier_of_geco_does_not_overflow_and_comes_back(dtype):
    objective = small("constrainedvae", constrained="recon", rate=1.0, bound=8000.0).to(dtype)
    low, high = LIMITS
    assert ascend(objective, 3000.0, 3000.0) == pytest.approx([high, high])
    assert ascend(objective, *[-3000.0] * 80)[-1] == pytest.approx(low)


VARIANCES = torch.tensor([1.0, 0.5], dtype=torch.float64)
NOISE = 0.1  # variance of the likelihood
SIGNS = torch.tensor(list(product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
IMAGES = (SIGNS[:, :2] * VARIANCES.sqrt()).reshape(1, 16, 1, 1, 2)


class Quadrature(Noise):
    """Two-point quadrature in place of draws: exact for the squared error of a linear decoder."""

    def normal(self, purpose: str, columns: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return SIGNS[:, 2:]


def linear(config: Config) -> Objective:
    """Two pixels of known variances, two latents, an encoder and a decoder that are linear."""
    torch.manual_seed(0)
    encoder = Sequential(nn.Flatten(), WideLinear(2, 4))
    decoder = Sequential(nn.Linear(2, 2), nn.Unflatten(1, (1, 1, 2)))
    return config.build(VAE(encoder, decoder, latent=2, pixel_range=(-1.0, 1.0)), World(), 16).double()


def look(objective: Objective) -> dict[str, torch.Tensor]:
    return objective(IMAGES, Quadrature(0, torch.arange(16)), torch.zeros(()), None)


@pytest.mark.parametrize(("constrained", "rate", "steps"), [("kl", 0.05, 600), ("recon", 0.01, 900)])
def test_the_constraint_is_met_by_the_kkt_multiplier(constrained, rate, steps, monkeypatch):
    """Of a linear Gaussian problem: a beta-VAE leaves every pixel a squared error of beta times the noise's variance,

    and kl = sum_i log(variance_i / error) / 2 (reverse water-filling).
    """
    monkeypatch.setattr(constrainedvae, "SMOOTHING", 0.9)  # quicker; where it rests does not depend on it
    kl = 1.0
    error = VARIANCES.prod().sqrt().item() * math.exp(-kl)
    beta, recon = error / NOISE, error / NOISE + math.log(2 * math.pi * NOISE)
    bound, multiplier = (kl, beta) if constrained == "kl" else (recon, 1 / beta)
    settings = {"likelihood": "gaussian", "scale": math.sqrt(NOISE)}
    objective = linear(Config(constrained=constrained, bound=bound, rate=rate, **settings))
    adam = torch.optim.Adam(objective.parameters(), lr=0.03)
    for _ in range(steps):
        found = look(objective)
        adam.zero_grad()
        found["loss"].backward()
        adam.step()
        objective.after_step({name: term.detach() for name, term in found.items()})

    found = look(objective)
    assert found["multiplier"].item() == pytest.approx(multiplier, rel=1e-3)
    assert (found["kl"].item(), found["recon"].item()) == pytest.approx((kl, recon), abs=1e-3)

    slopes = []
    for name in ("recon", "kl"):
        found = torch.autograd.grad(look(objective)[name], list(objective.parameters()), materialize_grads=True)
        slopes.append(torch.cat([slope.flatten() for slope in found]))
    d_recon, d_kl = slopes  # dRecon = -beta dKL in every direction: a beta-VAE would rest here too
    assert (d_recon + beta * d_kl).norm() < 0.01 * d_recon.norm()


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match="constrained=recon needs a bound"):
        Config(constrained="recon")
    with pytest.raises(ValueError, match=r"bound=-1.0 on kl, which is never negative"):
        Config(bound=-1.0)
    with pytest.raises(ValueError, match=r"multiplier=5000.0 of constrained=recon lies outside 0.001 to 1000"):
        Config(constrained="recon", bound=1.0, multiplier=5000.0)
