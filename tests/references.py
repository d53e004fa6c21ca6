"""Every objective as its paper writes it: of one dense batch on one process, plain torch, slow and obvious.

A reference gives losses and the terms that the objective reports. A player with a loss of its own has it under the name
of its parameters, `vae` is that of all others.
Weights, data and random numbers are the objective's own; the mathematics is not.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal

from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.objectives import Micro, Objective

Terms = dict[str, Tensor]
Reference = Callable[[Objective, Any, Sequence[Micro], float], tuple[Terms, Terms]]


class Pass(NamedTuple):
    """All rows of a step through the VAE."""

    mu: Tensor  # [batch, latent], as logvar and z
    logvar: Tensor
    z: Tensor
    recon: Tensor  # nats, mean over the batch
    kl: Tensor

    @property
    def terms(self) -> Terms:
        return {"recon": self.recon, "kl": self.kl}


def rows(micros: Sequence[Micro]) -> Micro:
    """The micro-batches as one batch."""
    positions = torch.cat([noise.positions for _, noise in micros])
    return torch.cat([images for images, _ in micros], 1), Noise(micros[0][1].seed, positions)


def through(vae: VAE, micros: Sequence[Micro]) -> Pass:
    """In one pass, or in one for each micro-batch where these have statistics of their own."""
    found = []
    for (images, *_), noise in micros if vae.couples_rows else [rows(micros)]:
        mu, logvar = vae.encode(images, noise)
        z = mu + (logvar / 2).exp() * noise.normal("latent", mu.shape[1], mu.dtype)
        logits = vae.decode(z, noise)
        nll = F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum((1, 2, 3))
        kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum(1)
        found.append((mu, logvar, z, nll, kl))
    mu, logvar, z, nll, kl = map(torch.cat, zip(*found, strict=True))
    return Pass(mu, logvar, z, nll.mean(), kl.mean())


def vae(objective: Objective, config: Any, micros: Sequence[Micro], step: float) -> tuple[Terms, Terms]:
    """Kingma & Welling 2014, eq. 10."""
    x = through(objective.vae, micros)
    return {"vae": x.recon + x.kl}, x.terms


def betavae(objective: Objective, config: Any, micros: Sequence[Micro], step: float) -> tuple[Terms, Terms]:
    """Higgins et al. 2017, eq. 4; the first step of a warm-up of n takes 1 / n of beta, the last all of it."""
    x = through(objective.vae, micros)
    beta = config.beta * (min(1, (step + 1) / config.warmup) if config.warmup else 1)
    return {"vae": x.recon + beta * x.kl}, x.terms


def annealedvae(objective: Objective, config: Any, micros: Sequence[Micro], step: float) -> tuple[Terms, Terms]:
    """Burgess et al. 2018, section 5, before the capacity has risen to its end."""
    x = through(objective.vae, micros)
    first, last = config.capacity
    capacity = torch.tensor(first + (last - first) * step / config.steps, dtype=torch.float64)
    return {"vae": x.recon + config.gamma * (x.kl - capacity).abs()}, x.terms | {"capacity": capacity}


def factorvae(objective: Any, config: Any, micros: Sequence[Micro], step: float) -> tuple[Terms, Terms]:
    """Kim & Mnih 2018, Algorithm 2 with both players' gradients at the weights before the step."""
    x = through(objective.vae, micros)
    other = [(images[1:], noise.fork("second batch")) for images, noise in micros]
    with torch.no_grad():  # Algorithm 1: every column of the second batch's z in an order of its own
        second = [objective.vae.encode(images[0], noise) for images, noise in other]
        normal = torch.cat([noise.normal("latent", x.z.shape[1], x.z.dtype) for _, noise in other])
        mu, logvar = map(torch.cat, zip(*second, strict=True))
        z = mu + (logvar / 2).exp() * normal
        orders = rows(micros)[1].bits("permute_dims", z.shape[1]).argsort(dim=0, stable=True)
        permuted = torch.stack([z[order, d] for d, order in enumerate(orders.T)], dim=1)
    log_d = objective.discriminator(x.z).log_softmax(1)
    tc = (log_d[:, 0] - log_d[:, 1]).mean()
    joint = objective.discriminator(x.z.detach()).log_softmax(1)
    product = objective.discriminator(permuted).log_softmax(1)
    discriminator = -0.5 * (joint[:, 0].mean() + product[:, 1].mean())
    right = torch.cat([joint[:, 0] > joint[:, 1], product[:, 1] > product[:, 0]])
    terms = {"tc": tc, "discriminator": discriminator, "discriminator_accuracy": right.double().mean()}
    return {"vae": x.recon + x.kl + config.gamma * tc, "discriminator": discriminator}, x.terms | terms


def betatcvae(objective: Objective, config: Any, micros: Sequence[Micro], step: float) -> tuple[Terms, Terms]:
    """Chen et al. 2018, eq. 4; q(z) by section 3.1 with its constants, or by appendix C.2 with M = B - 1.

    The mutual information is what the other terms leave of the analytic kl, as the objective says.
    """
    x = through(objective.vae, micros)
    batch, images, others = len(x.z), objective.images, len(x.z) - 1
    weights = torch.full((batch, batch), 1 / (images * batch), dtype=torch.float64)
    if config.sampling == "mss":
        weights.fill_(1 / others)
        for row in range(batch):
            weights[row, row] = 1 / images
            weights[row, (row + 1) % batch] = (images - others) / (images * others)
    density = Normal(x.mu, (x.logvar / 2).exp()).log_prob(x.z[:, None]).exp()  # [draw, image, latent]
    joint = (weights * density.prod(2)).sum(1).log()
    marginals = (weights[:, :, None] * density).sum(1).log().sum(1)
    prior = Normal(0.0, 1.0).log_prob(x.z).sum(1)
    tc, dwkl = (joint - marginals).mean(), (marginals - prior).mean()
    mi = x.kl - tc - dwkl
    loss = x.recon + config.alpha * mi + config.beta * tc + config.gamma * dwkl
    return {"vae": loss}, x.terms | {"mi": mi, "tc": tc, "dwkl": dwkl}


def dipvae(objective: Objective, config: Any, micros: Sequence[Micro], step: float) -> tuple[Terms, Terms]:
    """Kumar et al. 2018, eq. 6 and 7, with torch's covariance; lambda_d is the paper's ratio where it is not given."""
    x = through(objective.vae, micros)
    covariance, ratio = torch.cov(x.mu.T), 10
    if config.kind == "ii":
        covariance, ratio = covariance + torch.diag(x.logvar.exp().mean(0)), 1
    lambda_d = ratio * config.lambda_od if config.lambda_d is None else config.lambda_d
    same = torch.eye(len(covariance), dtype=torch.bool)
    off_diagonal, diagonal = covariance[~same].square().sum(), (covariance[same] - 1).square().sum()
    loss = x.recon + x.kl + config.lambda_od * off_diagonal + lambda_d * diagonal
    return {"vae": loss}, x.terms | {"off_diagonal": off_diagonal, "diagonal": diagonal}


def infovae(objective: Objective, config: Any, micros: Sequence[Micro], step: float) -> tuple[Terms, Terms]:
    """Zhao et al. 2019, eq. 6, with the unbiased MMD (Gretton et al. 2012, eq. 3) in the place of its divergence."""
    x = through(objective.vae, micros)
    batch, latent = x.z.shape
    prior = rows(micros)[1].normal("prior", latent, torch.float64)
    different = ~torch.eye(batch, dtype=torch.bool)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a[:, None] - b).square().sum(2) / (2 * (config.bandwidth or latent)))

    mmd = kernel(x.z, x.z)[different].mean() + kernel(prior, prior)[different].mean() - 2 * kernel(x.z, prior).mean()
    loss = x.recon + (1 - config.alpha) * x.kl + (config.alpha + config.lambda_mmd - 1) * mmd
    return {"vae": loss}, x.terms | {"mmd": mmd}


def constrainedvae(objective: Objective, config: Any, micros: Sequence[Micro], step: float) -> tuple[Terms, Terms]:
    """The Lagrangian of Higgins et al. 2017, section 2, or of Rezende & Viola 2018, at the multiplier of the start."""
    x = through(objective.vae, micros)
    multiplier = torch.tensor(config.multiplier, dtype=torch.float64)
    if config.constrained == "kl":
        loss = x.recon + multiplier * (x.kl - (25 if config.bound is None else config.bound))
    else:
        loss = x.kl + multiplier * (x.recon - config.bound)
    return {"vae": loss}, x.terms | {"multiplier": multiplier}


def qlae(objective: Any, config: Any, micros: Sequence[Micro], step: float) -> tuple[Terms, Terms]:
    """Hsu et al. 2023 in sums: a latent takes the nearest value of its codebook, and mu the decoder's gradient."""
    found = []
    for (images, *_), noise in micros if objective.vae.couples_rows else [rows(micros)]:
        mu, _ = objective.vae.encode(images, noise)
        columns = []
        for d, book in enumerate(objective.codebook.values):
            nearest = [min(range(len(book)), key=lambda k: abs(book[k] - value).item()) for value in mu[:, d]]
            columns.append(book[nearest])
        quantised = torch.stack(columns, dim=1)
        logits = objective.vae.decode(mu + (quantised - mu).detach(), noise)
        nll = F.binary_cross_entropy_with_logits(logits, images, reduction="none").sum((1, 2, 3))
        found.append((nll, (mu.detach() - quantised).square().sum(1), (mu - quantised.detach()).square().sum(1)))
    recon, quantize, commit = (torch.cat(term).mean() for term in zip(*found, strict=True))
    kl = torch.tensor(float(objective.vae.latent), dtype=torch.float64) * math.log(config.values)
    loss = recon + config.lambda_quantize * quantize + config.lambda_commit * commit
    return {"vae": loss}, {"recon": recon, "kl": kl, "quantize": quantize, "commit": commit}


REFERENCES: dict[str, tuple[Reference, list[dict[str, Any]]]] = {  # and the settings to compare them at
    "vae": (vae, [{}]),
    "betavae": (betavae, [{"beta": 4.0}, {"warmup": 3}, {"warmup": 100}]),
    "annealedvae": (annealedvae, [{"steps": 8}, {"gamma": 5.0, "capacity": (100.0, 40.0), "steps": 8}]),
    "factorvae": (factorvae, [{"gamma": 6.4}]),
    "betatcvae": (
        betatcvae,
        [{"beta": 6.0}, {"sampling": "mss"}, {"alpha": 0.5, "beta": 4.0, "gamma": 1.5, "sampling": "mss"}],
    ),
    "dipvae": (dipvae, [{"kind": "i"}, {"kind": "ii"}, {"kind": "ii", "lambda_od": 5.0, "lambda_d": 3.0}]),
    "constrainedvae": (
        constrainedvae,
        [{}, {"bound": 2.0, "multiplier": 3.0}, {"constrained": "recon", "bound": 90.0, "multiplier": 2.0}],
    ),
    "qlae": (qlae, [{}, {"values": 4, "lambda_quantize": 2.0, "lambda_commit": 3.0}]),
    "infovae": (infovae, [{}, {"alpha": 0.3, "lambda_mmd": 20.0, "bandwidth": 2.0}]),
}
