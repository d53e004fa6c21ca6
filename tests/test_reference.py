"""What benchmarks/reference.py computes is what is here: the same terms and gradients."""

from importlib import import_module

import pytest
import torch
from reference import LATENT, Training

from vaedist.models import conv64
from vaedist.noise import Noise
from vaedist.world import World

IMAGES, BATCH = 50, 6


@pytest.mark.parametrize("name", ["vae", "factorvae", "betatcvae"])
def test_the_reference_has_the_terms_and_gradients_of_the_objective(name):
    """Where chance has no say: posteriors so narrow that z = mu, a second batch of one image, whatever its order."""
    plain = Training(name, IMAGES, torch.device("cpu"))
    plain.vae.double(), plain.discriminator.double()
    with torch.no_grad():
        head = plain.vae.encoder[-1]
        head.weight[:LATENT] *= 50
        head.weight[LATENT:] = 0
        head.bias[LATENT:] = -60
    objective = import_module(f"vaedist.objectives.{name}").Config().build(
        conv64.Config().build((3, 64, 64), World()), World(), IMAGES
    ).double()  # fmt: skip
    pairs = [(objective.vae.encoder, plain.vae.encoder), (objective.vae.decoder, plain.vae.decoder)]
    if name == "factorvae":
        pairs.append((objective.discriminator, plain.discriminator))
    for ours, other in pairs:
        ours.load_state_dict(other.state_dict())

    images = torch.rand(2, BATCH, 3, 64, 64, dtype=torch.float64)
    images[1] = images[1, 0]
    noise, step = Noise(0, torch.arange(BATCH)), torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        surveyed = objective.survey([(images, noise)], step)[0]
    terms = objective(images, noise, step, surveyed)
    terms["loss"].backward()
    found = plain.step(images.unbind())

    for term in found.keys() - {"loss"}:
        torch.testing.assert_close(terms[term], found[term], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(terms["loss"], found["loss"] + found.get("discriminator", 0), rtol=1e-9, atol=1e-9)
    for ours, other in pairs:
        for mine, theirs in zip(ours.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-7, atol=1e-9)
