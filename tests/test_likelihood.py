"""Likelihoods against closed forms."""

import pytest
import torch
from torch.distributions import Bernoulli, Laplace, Normal

from vaedist.likelihood import Likelihood

torch.manual_seed(0)
DECODED = torch.randn(3, 3, 4, 4, dtype=torch.float64)
IMAGES = torch.rand(3, 3, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.5**0.5])
@pytest.mark.parametrize(("family", "distribution"), [("gaussian", Normal), ("laplace", Laplace)])
def test_nll_is_minus_the_log_density_summed_over_pixels(family, distribution, scale):
    expected = -distribution(DECODED, scale).log_prob(IMAGES).sum((1, 2, 3))
    torch.testing.assert_close(Likelihood(family, scale).nll(DECODED, IMAGES), expected, rtol=1e-12, atol=0)


def test_bernoulli_nll_of_binary_pixels_is_minus_their_log_probability():
    binary = IMAGES.round()
    expected = -Bernoulli(logits=DECODED).log_prob(binary).sum((1, 2, 3))
    torch.testing.assert_close(Likelihood("bernoulli", 1.0).nll(DECODED, binary), expected, rtol=1e-12, atol=0)


def test_bernoulli_nll_of_grey_pixels_is_the_cross_entropy():
    p = DECODED.sigmoid()
    expected = -(IMAGES * p.log() + (1 - IMAGES) * (1 - p).log()).sum((1, 2, 3))
    torch.testing.assert_close(Likelihood("bernoulli", 1.0).nll(DECODED, IMAGES), expected, rtol=1e-12, atol=0)


def test_gaussian_of_variance_one_half_is_the_plain_sum_of_squares():
    plain = (DECODED - IMAGES).square().sum((1, 2, 3))
    likelihood = Likelihood("gaussian", 0.5**0.5)
    constant = likelihood.nll(DECODED, DECODED)
    torch.testing.assert_close(likelihood.nll(DECODED, IMAGES) - constant, plain, rtol=1e-12, atol=0)


def test_the_mean_image_of_bernoulli_logits_is_their_sigmoid():
    assert torch.equal(Likelihood("bernoulli", 1.0).mean(DECODED), DECODED.sigmoid())
    assert torch.equal(Likelihood("laplace", 1.0).mean(DECODED), DECODED)
