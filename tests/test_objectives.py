"""Every objective, found by its file, keeps the contract; each against its equation written out plainly."""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vaedist import gaussian
from vaedist.config import ConfigError, available
from vaedist.models import conv64, conv128
from vaedist.noise import Noise
from vaedist.objectives import Objective
from vaedist.objectives.factorvae import Config as FactorVAEConfig
from vaedist.objectives.factorvae import Discriminator
from vaedist.world import World

OBJECTIVES = available("vaedist.objectives")
SHAPE = (3, 64, 64)
ROWS, IMAGES = 6, 50
START = torch.zeros((), dtype=torch.float64)


def build(name: str, **settings) -> Objective:
    torch.manual_seed(0)
    vae = conv64.Config(latent=5).build(SHAPE, World())
    return import_module(f"vaedist.objectives.{name}").Config(**settings).build(vae, World(), IMAGES).double()


def micro(objective: Objective, start: int = 0, rows: int = ROWS):
    torch.manual_seed(start)
    images = torch.rand(objective.streams, rows, *SHAPE, dtype=torch.float64)
    return images, Noise(7, torch.arange(start, start + rows))


def terms(objective: Objective) -> dict[str, torch.Tensor]:
    images, noise = micro(objective)
    with torch.no_grad():
        (surveyed,) = objective.survey([(images, noise)], START)
    return objective(images, noise, START, surveyed)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_gives_scalars_and_every_parameter_a_gradient(name):
    objective = build(name)
    found = terms(objective)
    assert {"loss", "recon", "kl"} <= found.keys()
    assert all(term.ndim == 0 and term.isfinite() for term in found.values())
    found["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_players_share_out_all_parameters(name):
    objective = build(name)
    shared = [p for group in objective.param_groups() for p in group["params"]]
    assert len(shared) == len(set(shared))
    assert set(shared) == set(objective.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_same_step_twice_is_the_same_bit_for_bit(name):
    first, second = terms(build(name)), terms(build(name))
    assert all(torch.equal(first[key], second[key]) for key in first)


def negative_elbo(objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    (images, *_), noise = micro(objective)
    mu, logvar = objective.vae.encode(images, noise)
    z = mu + (logvar / 2).exp() * noise.normal("latent", 5, torch.float64)
    logits = objective.vae.decode(z, noise)
    recon = F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / ROWS
    return recon, -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum() / ROWS


@pytest.mark.parametrize(("name", "beta"), [("vae", 1.0), ("betavae", 4.0)])
def test_vae_and_betavae_are_their_equations(name, beta):
    objective = build(name)
    recon, kl = negative_elbo(objective)
    found = terms(objective)
    torch.testing.assert_close(found["recon"], recon, rtol=1e-12, atol=0)
    torch.testing.assert_close(found["kl"], kl, rtol=1e-12, atol=0)
    torch.testing.assert_close(found["loss"], recon + beta * kl, rtol=1e-12, atol=0)


def plain_factorvae(vae: nn.Module, discriminator: nn.Module, gamma: float, images, second, noise, permuted):
    """The two losses as Algorithm 2 of Kim & Mnih writes them, each with its own backward."""
    mu, logvar = vae.encode(images, noise)
    z = gaussian.sample(mu, logvar, noise.normal("latent", mu.shape[1], mu.dtype))
    recon = F.binary_cross_entropy_with_logits(vae.decode(z, noise), images, reduction="sum") / len(images)
    kl = gaussian.kl(mu, logvar).sum() / len(images)
    log_d = discriminator(z).log_softmax(1)
    vae_loss = recon + kl + gamma * (log_d[:, 0] - log_d[:, 1]).mean()
    log_d = discriminator(z.detach()).log_softmax(1)
    log_d_permuted = discriminator(permuted).log_softmax(1)
    return vae_loss, -(log_d[:, 0].sum() + log_d_permuted[:, 1].sum()) / (2 * len(images))


def test_factorvae_is_the_plain_two_optimiser_update_over_many_steps():
    """Loss, gradients and weights equal those of two modules, two backwards and two Adams."""
    from copy import deepcopy

    objective = build("factorvae", gamma=6.4, discriminator=Discriminator(width=40, lr=1e-3))
    vae, discriminator = deepcopy(objective.vae), deepcopy(objective.discriminator)
    ours = torch.optim.Adam(objective.param_groups(), lr=1e-3)
    adam_vae = torch.optim.Adam(vae.parameters(), lr=1e-3)
    adam_discriminator = torch.optim.Adam(discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for step in range(3):
        images, noise = micro(objective, start=step * ROWS)
        with torch.no_grad():
            (permuted,) = objective.survey([(images, noise)], START)
        found = objective(images, noise, START, permuted)
        ours.zero_grad()
        found["loss"].backward()

        vae_loss, discriminator_loss = plain_factorvae(vae, discriminator, 6.4, *images, noise, permuted)
        vae_gradients = torch.autograd.grad(vae_loss, list(vae.parameters()))
        discriminator_gradients = torch.autograd.grad(discriminator_loss, list(discriminator.parameters()))
        torch.testing.assert_close(found["loss"], vae_loss + discriminator_loss, rtol=1e-12, atol=0)
        for player, gradients in ((objective.vae, vae_gradients), (objective.discriminator, discriminator_gradients)):
            for parameter, gradient in zip(player.parameters(), gradients, strict=True):
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-14)
        for reference, player, gradients in (
            (adam_vae, vae, vae_gradients),
            (adam_discriminator, discriminator, discriminator_gradients),
        ):
            for parameter, gradient in zip(player.parameters(), gradients, strict=True):
                parameter.grad = gradient
            reference.step()
        ours.step()
    for mine, other in ((objective.vae, vae), (objective.discriminator, discriminator)):
        for a, b in zip(mine.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_factorvae_keeps_the_players_gradients_apart():
    objective = build("factorvae", discriminator=Discriminator(width=40))
    found = terms(objective)
    own = objective.vae.encoder[0].weight
    (leak,) = torch.autograd.grad(found["discriminator"], own, retain_graph=True, allow_unused=True)
    assert leak is None
    weights = list(objective.discriminator.parameters())
    for term in ("recon", "kl", "tc"):
        leaks = torch.autograd.grad(found[term], weights, retain_graph=True, allow_unused=True)
        assert all(leak is None for leak in leaks)
    (pressure,) = torch.autograd.grad(found["tc"], own)
    assert pressure.abs().sum() > 0


def test_factorvae_permutes_the_second_batch_over_all_micro_batches():
    objective = build("factorvae", discriminator=Discriminator(width=40))
    images, noise = micro(objective, rows=12)
    whole = [(images, noise)]
    halves = [(images[:, i : i + 6], Noise(noise.seed, noise.positions[i : i + 6])) for i in (0, 6)]
    with torch.no_grad():
        (at_once,) = objective.survey(whole, START)
        in_two = torch.cat(list(objective.survey(halves, START)))
        z = objective.posterior(images[1], noise.fork("second batch")).z
    torch.testing.assert_close(in_two, at_once, rtol=1e-12, atol=1e-13)
    assert torch.equal(at_once.sort(0).values, z.sort(0).values)
    assert (at_once != z).any(0).all()
    rows = [(column[:, None] == z[:, k]).int().argmax(1) for k, column in enumerate(at_once.T)]
    assert len({tuple(order.tolist()) for order in rows}) == z.shape[1]  # every dimension by a permutation of its own


def test_the_discriminator_is_the_papers():
    network = FactorVAEConfig().discriminator.build(latent=10)
    shapes = [(layer.in_features, layer.out_features) for layer in network if isinstance(layer, nn.Linear)]
    assert shapes == [(10, 1000), *[(1000, 1000)] * 5, (1000, 2)]
    assert all(layer.negative_slope == 0.2 for layer in network if isinstance(layer, nn.LeakyReLU))


def test_options_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"scale=0.5 belongs to the likelihoods gaussian and laplace"):
        FactorVAEConfig(scale=0.5)
    vae = conv128.Config(hidden=8).build((3, 128, 128), World())
    with pytest.raises(ConfigError, match=r"likelihood=bernoulli needs pixels in \[0, 1\]"):
        FactorVAEConfig().build(vae, World(), IMAGES)
