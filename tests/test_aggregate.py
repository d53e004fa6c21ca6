"""The estimates of q(z) against mixtures whose terms are known, and against what other code makes of them."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from vaedist import aggregate
from vaedist.aggregate import averaged, decompose, log_density, report, stratified, weighted
from vaedist.config import ConfigError
from vaedist.gaussian import Posterior, kl, sample
from vaedist.noise import Noise
from vaedist.world import World

ESTIMATES = (weighted, stratified, averaged)
every_estimate = pytest.mark.parametrize("weights", ESTIMATES, ids=lambda weights: weights.__name__)
START = 7  # batches begin anywhere in the stream


def test_of_a_set_of_one_image_q_is_its_posterior():
    q = posteriors(1, 3)
    found = log_density(q.z, positions(1), q, positions(1), averaged(1, 1))
    assert torch.allclose(found[:, 1:], q.log_density(q.z)[:, 0])
    assert torch.allclose(found[:, 0], found[:, 1:].sum(1))


def posteriors(images: int, latent: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Posterior:
    """Posteriors as training makes them: of widths from 0.2 to 1, their means as wide as the prior."""
    torch.manual_seed(seed)
    mu, normal = torch.randn(2, images, latent, dtype=dtype).unbind()
    logvar = 2 * torch.empty_like(mu).uniform_(0.2, 1).log()
    return Posterior(mu, logvar, sample(mu, logvar, normal))


def rows(q: Posterior, chosen) -> Posterior:
    return Posterior(*(latent[chosen] for latent in q))


def positions(batch: int) -> Tensor:
    return torch.arange(START, START + batch)


def mixture(q: Posterior) -> MixtureSameFamily:
    components = Independent(Normal(q.mu, (q.logvar / 2).exp()), 1)
    return MixtureSameFamily(Categorical(torch.ones(len(q.mu), dtype=q.mu.dtype)), components)


def written_out(weights, batch: int, images: int) -> Tensor:
    """The matrix of weights, cell by cell from the papers."""
    n, m = images, batch - 1
    matrix = torch.empty(batch, batch, dtype=torch.float64)
    for i, j in itertools.product(range(batch), repeat=2):
        cells = {
            weighted: 1 / (n * batch),
            stratified: 1 / n if j == i else (n - m) / (n * m) if j == (i + 1) % batch else 1 / m,
            averaged: 1 / n if j == i else (n - 1) / (n * m),
        }
        matrix[i, j] = cells[weights]
    return matrix


def shipped(batch: int, images: int) -> Tensor:
    """The matrix of the code published with the paper: its stride of M + 1 goes down a column, not the diagonal."""
    n, m = images, batch - 1
    matrix = torch.full((batch, batch), 1 / m, dtype=torch.float64)
    matrix.view(-1)[:: m + 1] = 1 / n
    matrix.view(-1)[1 :: m + 1] = (n - m) / (n * m)
    matrix[m - 1, 0] = (n - m) / (n * m)
    return matrix


def dense(q: Posterior, matrix: Tensor) -> Tensor:
    """log q(z) and log q(z_d) at all draws, from one matrix of weights, [batch, 1 + latent]."""
    pairs = Normal(q.mu, (q.logvar / 2).exp()).log_prob(q.z[:, None])
    joint = (matrix.log() + pairs.sum(2)).logsumexp(1, keepdim=True)
    return torch.cat([joint, (matrix.log()[:, :, None] + pairs).logsumexp(1)], dim=1)


class Indicator(tuple):
    """A batch of as many latents as rows, in which only row d has mass in latent d."""

    __slots__ = ()

    def log_density(self, z: Tensor) -> Tensor:
        return torch.eye(z.shape[1], dtype=z.dtype).log().expand(len(z), -1, -1)


@every_estimate
def test_the_weights_are_the_matrix_of_the_paper(weights):
    batch, images = 5, 11
    columns = positions(batch).roll(2)  # a batch begins at any position and comes in any order
    z = torch.zeros(batch, batch, dtype=torch.float64)
    found = log_density(z, positions(batch), Indicator(), columns, weights(batch, images))[:, 1:].exp()
    torch.testing.assert_close(found.roll(-2, 1), written_out(weights, batch, images), rtol=1e-12, atol=0)
    rows_sum_to = batch / (images * batch) if weights is weighted else 1.0
    torch.testing.assert_close(found.sum(1), torch.full_like(found[0], rows_sum_to), rtol=1e-12, atol=0)
    assert not torch.allclose(shipped(batch, images), written_out(weights, batch, images), rtol=0.1)


def over_all_batches(q: Posterior, batch: int, estimate) -> tuple[Tensor, Tensor]:
    """Mean and variance of the estimates of q(z) and q(z_d) at the draw of each image, [images, 1 + latent] each."""
    found: list[list[Tensor]] = [[] for _ in q.z]
    for chosen in itertools.permutations(range(len(q.z)), batch):
        for image, density in zip(chosen, estimate(rows(q, list(chosen))).exp(), strict=True):
            found[image].append(density)
    densities = torch.stack([torch.stack(of_image) for of_image in found])
    return densities.mean(1), densities.var(1, correction=0)


def test_the_mean_of_q_over_all_batches_is_that_of_the_set():
    """Of q(z), not of its log; the matrix that others ship fails, and `averaged` has the least variance."""
    images, batch = 5, 3
    q = posteriors(images, 2)
    truth = dense(q, torch.full((images, images), 1 / images, dtype=torch.float64)).exp()
    torch.testing.assert_close(truth[:, 0], mixture(q).log_prob(q.z).exp(), rtol=1e-12, atol=0)

    def ours(weights):
        weights = weights(batch, images)
        return over_all_batches(q, batch, lambda q: log_density(q.z, positions(batch), q, positions(batch), weights))

    (mean, variance), (averaged_mean, averaged_variance) = ours(stratified), ours(averaged)
    torch.testing.assert_close(mean, truth, rtol=1e-12, atol=0)
    torch.testing.assert_close(averaged_mean, truth, rtol=1e-12, atol=0)
    assert (averaged_variance < variance).all()
    theirs, _ = over_all_batches(q, batch, lambda q: dense(q, shipped(batch, images)))
    assert (theirs / truth - 1).abs().max() > 0.1


def test_averaged_over_the_whole_set_is_the_mixture():
    q, elsewhere = posteriors(12, 3), torch.randn(12, 3, dtype=torch.float64)
    found = log_density(elsewhere, positions(12), q, positions(12), averaged(12, 12))
    torch.testing.assert_close(found[:, 0], mixture(q).log_prob(elsewhere), rtol=1e-12, atol=0)
    for d in range(3):
        marginal = mixture(rows(q, (slice(None), slice(d, d + 1))))
        torch.testing.assert_close(found[:, 1 + d], marginal.log_prob(elsewhere[:, d : d + 1]), rtol=1e-12, atol=0)


def integrated(q: Posterior) -> Tensor:
    """mi, tc and dwkl of the mixture of two-dimensional posteriors, by the trapezoidal rule."""
    line = torch.linspace(-8, 8, 401, dtype=torch.float64)
    cell = (line[1] - line[0]) ** 2
    z = torch.cartesian_prod(line, line)
    each = Normal(q.mu, (q.logvar / 2).exp()).log_prob(z[:, None]).sum(2)  # [cells, images]
    joint = each.logsumexp(1) - math.log(len(q.mu))
    marginals = [mixture(rows(q, (slice(None), [d]))).log_prob(z[:, [d]]) for d in (0, 1)]
    product, prior = sum(marginals), Normal(0.0, 1.0).log_prob(z).sum(1)
    mi = (each.exp() * (each - joint[:, None])).sum() * cell / len(q.mu)
    tc, dwkl = ((joint.exp() * difference).sum() * cell for difference in (joint - product, product - prior))
    return torch.stack([mi, tc, dwkl])


def within_four_standard_errors(found: Tensor, truth: Tensor) -> bool:
    """Of the means of the columns of `found`."""
    error = found.std(0) / len(found) ** 0.5
    return bool(((found.mean(0) - truth).abs() <= 4 * error).all())


def test_the_terms_of_a_mixture_are_those_that_integration_gives():
    q = posteriors(8, 2)
    truth = integrated(q)
    torch.testing.assert_close(truth.sum(), q.kl().sum(1).mean(), rtol=1e-9, atol=0)  # the integration is exact
    found = []
    for seed in range(600):
        noise = Noise(seed, positions(8))
        z = sample(q.mu, q.logvar, noise.normal("latent", 2, torch.float64))
        found.append(torch.stack(decompose(q._replace(z=z), noise, World(), averaged, 8)))
    assert within_four_standard_errors(torch.stack(found), truth)


def test_the_terms_and_the_gradient_of_a_linear_gaussian_set_are_in_closed_form():
    """Means on a fine grid of quantiles, so that the mixture is nearly a Gaussian."""
    quantiles = torch.special.ndtri((torch.arange(24, dtype=torch.float64) + 0.5) / 24)
    grid = torch.cartesian_prod(quantiles, quantiles) / quantiles.std(correction=0)
    logvar = torch.full_like(grid, math.log(0.36))
    found = []
    for seed in range(24):
        correlation = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
        second = correlation * grid[:, 0] + (1 - correlation.square()).sqrt() * grid[:, 1]
        mu = 0.8 * torch.stack([grid[:, 0], second], dim=1)
        noise = Noise(seed, positions(len(grid)))
        q = Posterior(mu, logvar, sample(mu, logvar, noise.normal("latent", 2, torch.float64)))
        mi, tc, dwkl = decompose(q, noise, World(), averaged, len(grid))
        (slope,) = torch.autograd.grad(tc, correlation)
        found.append(torch.stack([mi, tc, dwkl, slope]).detach())
    r = 0.64 * 0.8
    tc = -0.5 * math.log(1 - r**2)
    truth = torch.tensor([-math.log(0.36) - tc, tc, 0.0, 0.64 * r / (1 - r**2)], dtype=torch.float64)
    assert within_four_standard_errors(torch.stack(found), truth)


def test_dropping_the_constants_moves_tc_by_every_latent_but_one():
    """What other code prints as TC is (d - 1) log(N B) too low."""
    q, batch, images, latent = posteriors(6, 3), 6, 1000, 3
    _, tc, _ = decompose(q, Noise(0, positions(batch)), World(), weighted, images)
    density = dense(q, torch.ones(batch, batch, dtype=torch.float64))
    without = (density[:, 0] - density[:, 1:].sum(1)).mean()
    torch.testing.assert_close(tc - without, torch.tensor((latent - 1) * math.log(images * batch)).double())


def test_densities_far_below_the_smallest_number_are_kept():
    q = Posterior(torch.zeros(4, 3), torch.full((4, 3), -6.0), torch.full((4, 3), 2.0))
    found = log_density(q.z, positions(4), q, positions(4), averaged(4, 4))
    torch.testing.assert_close(found[:, 0], mixture(q).log_prob(q.z), rtol=1e-6, atol=0)
    assert found[0, 0] < -300
    assert q.log_density(q.z).sum(2).exp().mean(1).log()[0] == -math.inf  # as other code does


@pytest.mark.parametrize("chunk", [1, 50, 2**22])
@every_estimate
def test_values_and_gradients_are_those_of_one_dense_matrix(weights, chunk, monkeypatch):
    monkeypatch.setattr(aggregate, "CHUNK", chunk)
    batch, images, latent = 9, 40, 3
    q = Posterior(*(values.requires_grad_() for values in posteriors(batch, latent)))
    found = log_density(q.z, positions(batch), q, positions(batch), weights(batch, images))
    reference = dense(q, written_out(weights, batch, images))
    torch.testing.assert_close(found, reference, rtol=1e-10, atol=1e-12)
    slope = torch.randn(batch, 1 + latent, dtype=torch.float64)
    gradients, expected = (torch.autograd.grad(values, q, slope) for values in (found, reference))
    torch.testing.assert_close(gradients, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [8, 2**22])
@every_estimate
def test_the_gradients_of_the_terms_are_finite_differences(weights, chunk, monkeypatch):
    monkeypatch.setattr(aggregate, "CHUNK", chunk)

    def terms(*latents: Tensor) -> tuple[Tensor, ...]:
        return decompose(Posterior(*latents), Noise(0, positions(4)), World(), weights, 30)

    assert torch.autograd.gradcheck(terms, [values.requires_grad_() for values in posteriors(4, 2)])


def test_the_rows_of_a_rank_against_all_columns_are_rows_of_the_whole():
    q, batch = posteriors(8, 3), 8
    everything = positions(batch)
    whole = log_density(q.z, everything, q, everything, stratified(batch, 30))
    parts = [
        log_density(q.z[i : i + 2], everything[i : i + 2], q, everything, stratified(batch, 30)) for i in (0, 2, 4, 6)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=0)


def test_an_estimate_per_rank_would_change_the_pressure_on_tc_with_the_number_of_ranks():
    """dTC / d correlation of 256 images on 1 and on 32 ranks that do not gather (minibatch-weighted sampling)."""
    slopes = {1: 0.0, 32: 0.0}
    for ranks in slopes:
        for seed in range(8):
            torch.manual_seed(seed)
            correlation = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
            grid, normal = torch.randn(2, 256, 2, dtype=torch.float64).unbind()
            second = correlation * grid[:, 0] + (1 - correlation.square()).sqrt() * grid[:, 1]
            mu = torch.stack([grid[:, 0], second], dim=1)
            logvar = torch.full_like(mu, math.log(0.16))
            q = Posterior(mu, logvar, sample(mu, logvar, normal))
            for part in torch.arange(256).chunk(ranks):
                tc = decompose(rows(q, part), Noise(0, part), World(), weighted, 20_000).tc / (8 * ranks)
                slopes[ranks] += torch.autograd.grad(tc, correlation, retain_graph=True)[0].item()
    assert slopes[32] < 0.6 * slopes[1]


@pytest.mark.parametrize("batch", [64, 4096])
def test_the_terms_sum_to_the_kl_in_single_precision(batch):
    """Of ten latents, from wide to narrow, and 17 nats."""
    torch.manual_seed(0)
    logvar = torch.linspace(-7, 0, 10).expand(batch, 10)
    mu = (1 - logvar.exp()).sqrt() * torch.randn(batch, 10)
    q = Posterior(mu, logvar, sample(mu, logvar, torch.randn(batch, 10)))
    with torch.no_grad():
        found = report(q, Noise(0, positions(batch)), World(), 200_000)
    assert 16 < kl(mu, logvar).sum(1).mean() < 19
    assert abs(sum(found[name].item() for name in ("mi", "tc", "dwkl")) - found["kl"].item()) <= 1e-5


@pytest.mark.parametrize("batch", [1, 12])
def test_stratified_sampling_of_a_batch_without_others_or_of_more_than_the_set_is_refused(batch):
    with pytest.raises(ConfigError, match=f"needs 2 to 10 images a batch, train.batch={batch}: change that, or say"):
        stratified(batch, 10)
