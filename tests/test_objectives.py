"""Every objective, found by its file, keeps the contract and is the equation that references.py writes out plainly."""

import copy

import pytest
import torch
from references import REFERENCES
from small import NETWORKS, STEP, config, micro_batches, small, step
from torch import nn

from vaedist.config import ConfigError, available
from vaedist.layers import BatchNorm2d
from vaedist.models import conv128
from vaedist.noise import Noise
from vaedist.objectives.annealedvae import Config as AnnealedVAEConfig
from vaedist.objectives.betatcvae import Config as BetaTCVAEConfig
from vaedist.objectives.factorvae import Config as FactorVAEConfig
from vaedist.objectives.factorvae import Discriminator
from vaedist.world import World

OBJECTIVES = available("vaedist.objectives")
SETTINGS = [(name, settings) for name in OBJECTIVES for settings in REFERENCES.get(name, (None, [{}]))[1]]
SMALL = {"factorvae": {"discriminator": Discriminator(layers=2, width=20)}}  # what no equation speaks of


def build(name: str, network: str = "plain", **settings):
    return small(name, network, **SMALL.get(name, {}) | settings)


def gradients(objective) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in objective.named_parameters()}


def assert_close(found, expected, name: str) -> None:
    """To 1e-9 of the largest number of the tensor."""
    torch.testing.assert_close(
        found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item(), msg=lambda m: f"{name}: {m}"
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_gives_scalars_and_every_parameter_a_gradient(name):
    objective = build(name)
    found = step(objective, micro_batches(objective.streams))
    assert {"loss", "recon", "kl"} <= found.keys()
    assert all(term.ndim == 0 and term.isfinite() for term in found.values())
    assert all(gradient.abs().sum() > 0 for gradient in gradients(objective).values())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_players_share_out_all_parameters(name):
    objective = build(name)
    shared = [p for group in objective.param_groups() for p in group["params"]]
    assert len(shared) == len(set(shared))
    assert set(shared) == set(objective.parameters())


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_an_objective_is_its_papers_equation_in_any_number_of_micro_batches(name, settings, network, parts):
    """Terms, the gradient of every parameter from its own player's loss, and the running statistics."""
    if name not in REFERENCES:
        pytest.fail(
            f"vaedist/objectives/{name}.py has no reference: write its paper's equation plainly for one dense batch in "
            "tests/references.py, and add it to REFERENCES there with the settings to compare them at"
        )
    reference, _ = REFERENCES[name]
    objective = build(name, network, **settings)
    plain, micros = copy.deepcopy(objective), micro_batches(objective.streams, parts)
    found = step(objective, micros)

    losses, terms = reference(plain, config(name, **SMALL.get(name, {}) | settings), micros, STEP.item())
    assert found.keys() == {"loss", *terms}
    for term, expected in (terms | {"loss": torch.stack(list(losses.values())).sum()}).items():
        assert_close(found[term], expected.detach(), term)
    names = {parameter: key for key, parameter in plain.named_parameters()}
    found_gradients = gradients(objective)
    for player in plain.param_groups():
        loss = losses.get(player["name"], losses["vae"])
        expected = torch.autograd.grad(loss, player["params"], retain_graph=True)
        for parameter, gradient in zip(player["params"], expected, strict=True):
            assert_close(found_gradients[names[parameter]], gradient, names[parameter])
    for (key, buffer), expected in zip(objective.named_buffers(), plain.buffers(), strict=True):
        assert_close(buffer.nan_to_num(), expected.nan_to_num(), key)  # a moving average of no step yet is NaN


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_the_same_step_twice_is_the_same_bit_for_bit(name, settings, network, parts):
    first, second = build(name, network, **settings), build(name, network, **settings)
    terms, again = (step(objective, micro_batches(objective.streams, parts)) for objective in (first, second))
    assert all(torch.equal(terms[key], again[key]) for key in terms)
    assert all(torch.equal(a, b) for a, b in zip(gradients(first).values(), gradients(second).values(), strict=True))


def test_conv128_surveys_the_latents_it_trains_on_and_moves_its_statistics_in_the_passes_that_train():
    """A coupled objective under accumulation: once per micro-batch, not by `survey` nor by `latents`."""
    vae = conv128.Config(hidden=8, latent=3).build((3, 128, 128), World())
    objective = BetaTCVAEConfig(likelihood="gaussian").build(vae, World(), 50).double()
    drawn, looks = [], objective.posterior
    objective.posterior = lambda images, noise: drawn.append(looks(images, noise)) or drawn[-1]
    averages = {layer: layer.running_mean.clone() for layer in vae.modules() if isinstance(layer, BatchNorm2d)}

    def follow(layer, inputs) -> None:
        if torch.is_grad_enabled():
            averages[layer].lerp_(inputs[0].detach().mean((0, 2, 3)), 0.1)

    for layer in averages:
        layer.register_forward_pre_hook(follow)
    images = torch.rand(1, 4, 3, 128, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step(objective, [(images[:, i : i + 2], Noise(7, torch.arange(i, i + 2))) for i in (0, 2)])
    surveyed, looked_at, trained_on = drawn[:2], drawn[2:4], drawn[4:]
    for first, second, third in zip(surveyed, looked_at, trained_on, strict=True):
        assert torch.equal(first.z, third.z)
        assert torch.equal(second.z, third.z)
    for layer, average in averages.items():
        assert_close(layer.running_mean, average, "running_mean")


@pytest.mark.parametrize(
    ("steps", "capacity"), [(0, 0.5), (1, 0.500245), (50_000, 12.75), (100_000, 25), (1_000_000, 25)]
)
def test_annealedvaes_capacity_rises_linearly_and_stays(steps, capacity):
    objective = build("annealedvae")
    ((images, noise),) = micro_batches(1)
    found = objective(images, noise, torch.tensor(float(steps)), None)
    assert AnnealedVAEConfig().capacity == (0.5, 25)
    assert found["capacity"].item() == pytest.approx(capacity, rel=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
def test_annealedvaes_capacity_is_that_of_the_whole_batch(network):
    """Some micro-batches are above it and some below, and their distances would not cancel."""
    micros = micro_batches(1, parts=3)
    kl = step(build("annealedvae", network), micros)["kl"].item()
    found = step(build("annealedvae", network, capacity=(kl, kl)), micros)
    assert abs(found["loss"] - found["recon"]) < 1e-9


def test_factorvae_is_the_plain_two_optimiser_update_over_many_steps():
    """Weights equal those of two modules, two backwards and two Adams."""
    settings = {"gamma": 6.4, "discriminator": Discriminator(width=40, lr=1e-3)}
    objective, plain = (build("factorvae", **settings) for _ in range(2))
    ours = torch.optim.Adam(objective.param_groups(), lr=1e-3)
    theirs = {
        "vae": torch.optim.Adam(plain.vae.parameters(), lr=1e-3),
        "discriminator": torch.optim.Adam(plain.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9)),
    }
    for number in range(3):
        micros = micro_batches(2, first=12 * number)
        step(objective, micros)
        losses, _ = REFERENCES["factorvae"][0](plain, config("factorvae", **settings), micros, STEP.item())
        for player in plain.param_groups():
            found = torch.autograd.grad(losses[player["name"]], player["params"], retain_graph=True)
            for parameter, gradient in zip(player["params"], found, strict=True):
                parameter.grad = gradient
        for optimizer in (ours, *theirs.values()):
            optimizer.step()
    for mine, other in zip(objective.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


def test_factorvae_keeps_the_players_gradients_apart():
    objective = build("factorvae")
    ((images, noise),) = micros = micro_batches(2)
    with torch.no_grad():
        (surveyed,) = objective.survey(micros, STEP)
    found = objective(images, noise, STEP, surveyed)
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
    objective = build("factorvae")
    ((images, noise),) = whole = micro_batches(2)
    with torch.no_grad():
        (at_once,) = objective.survey(whole, STEP)
        in_two = torch.cat(list(objective.survey(micro_batches(2, parts=2), STEP)))
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
        FactorVAEConfig().build(vae, World(), 50)
