"""Latent quantisation: the code, who gets which gradient, and what the decomposition says of a code."""

import math

import pytest
import torch
from small import IMAGES, LATENT, STEP, micro_batches, small

from vaedist.aggregate import report
from vaedist.noise import Noise
from vaedist.objectives import Objective
from vaedist.objectives.qlae import Code
from vaedist.optimizer import Config as Optimizer
from vaedist.world import World


def spread(**settings) -> Objective:
    """With codebooks that differ from latent to latent."""
    objective = small("qlae", **settings)
    with torch.no_grad():
        objective.codebook.values += 0.1 * torch.randn_like(objective.codebook.values)
    return objective


def encoded(objective: Objective) -> tuple[Code, torch.Tensor, Noise]:
    ((images, noise),) = micro_batches(objective.streams)
    return objective.posterior(images[0], noise), images[0], noise


def test_every_latent_takes_the_nearest_value_of_its_own_codebook():
    objective = spread(values=7)
    q, _, _ = encoded(objective)
    nearest = [
        [
            min(book, key=lambda value: abs(value - mu))
            for mu, book in zip(row, objective.codebook.values.tolist(), strict=True)
        ]
        for row in q.mu.tolist()
    ]
    assert q.z.tolist() == q.quantised.tolist() == nearest
    assert len({tuple(row) for row in nearest}) > 1


def test_the_papers_lambdas_are_of_means_over_pixels_and_latents():
    objective = small("qlae")
    pixels, latents = 3 * 64 * 64, 10
    assert objective.lambda_quantize == objective.lambda_commit == pytest.approx(0.01 * pixels / latents)


def test_the_encoder_gets_the_decoders_gradient():
    objective = spread()
    q, images, noise = encoded(objective)
    (straight_through,) = torch.autograd.grad(objective.recon(q.z, images, noise), q.mu)
    z = q.quantised.detach().requires_grad_()
    (decoders,) = torch.autograd.grad(objective.recon(z, images, noise), z)
    assert torch.equal(straight_through, decoders)
    assert decoders.abs().min() > 0


def test_the_quantize_term_alone_moves_the_codebook_and_nothing_else():
    objective = spread()
    ((images, noise),) = micro_batches(objective.streams)
    found = objective(images, noise, STEP, None)
    weights = list(objective.vae.parameters())

    def gradients(name: str, of: list[torch.Tensor]) -> list[torch.Tensor | None]:
        return list(torch.autograd.grad(found[name], of, retain_graph=True, allow_unused=True))

    assert gradients("recon", [objective.codebook.values]) == gradients("commit", [objective.codebook.values]) == [None]
    assert gradients("quantize", weights) == [None] * len(weights)
    assert any(gradient is not None and gradient.any() for gradient in gradients("commit", weights))

    q, _, _ = encoded(objective)
    (gradient,) = gradients("quantize", [objective.codebook.values])
    for latent, book in enumerate(objective.codebook.values):
        for number, value in enumerate(book):
            own = q.mu[:, latent][q.z[:, latent] == value]
            torch.testing.assert_close(gradient[latent, number], 2 * (value - own).sum() / len(q.mu))


def test_the_decomposition_of_a_code_is_made_of_its_entropies():
    """Four values; a latent that takes two of them, its copy, an independent one, and one that never moves."""
    first = torch.tensor([0, 0, 1, 1] * 2)
    independent = torch.tensor([0, 1] * 4)
    z = torch.stack([first, first + 5, independent, torch.zeros(8)], dim=1).double()
    q = Code(z, z, z, torch.full_like(z, -math.log(4)))
    found = report(q, Noise(0, torch.arange(8)), World(), images=8)
    joint, marginals, prior = math.log(4), 3 * math.log(2), 4 * math.log(4)
    for name, value in (("kl", prior), ("mi", joint), ("tc", marginals - joint), ("dwkl", prior - marginals)):
        assert found[name].item() == pytest.approx(value, rel=1e-12), name
    assert found["active_units"] == 3


def test_the_weights_of_the_vae_decay_and_nothing_else():
    objective = small("qlae", weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    optimizer = Optimizer(lr=1e-3).build(objective.param_groups())
    for parameter in objective.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in objective.named_parameters():
        decays = name.endswith("weight")
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 1e-3 * 0.5 * decays), rtol=1e-15, atol=0)


def test_the_prior_draws_every_value_of_every_codebook_equally_often():
    objective = spread()
    count = 10_000
    z = objective.prior(Noise(0, torch.arange(count)), torch.float64)
    hits = (z[:, :, None] == objective.codebook.values).sum(0)
    assert hits.sum() == z.numel()
    assert (hits - count / 10).abs().max() < 4 * math.sqrt(count * 0.1 * 0.9)


def test_a_traversal_shows_the_values_of_the_codebook_in_order():
    objective = spread(values=7)
    books = objective.codebook.values.sort(1).values
    assert torch.equal(objective.traversal(7), books)
    assert torch.equal(objective.traversal(4), books[:, [0, 2, 4, 6]])
    assert all(
        set(row) == set(book) for row, book in zip(objective.traversal(11).tolist(), books.tolist(), strict=True)
    )


def test_a_run_reports_the_entropy_of_its_code():
    objective = spread()
    found = objective.latents(micro_batches(objective.streams))
    assert found["kl"].item() == pytest.approx(LATENT * math.log(10), rel=1e-12)
    assert (found["mi"] + found["tc"] + found["dwkl"]).item() == pytest.approx(found["kl"].item(), rel=1e-12)
    assert 0 < found["mi"].item() <= math.log(IMAGES)
