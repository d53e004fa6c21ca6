"""What is minimised, one file per objective: `Config.build(vae, world, images)` gives an `Objective`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vaedist import aggregate, gaussian
from vaedist.config import ConfigError, bounded
from vaedist.likelihood import Family, Likelihood
from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.posterior import Posterior
from vaedist.world import World

Micro = tuple[Tensor, Noise]  # images [streams, local, C, H, W] of a micro-batch, and the noise of its rows [local]


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every objective has."""

    likelihood: Family = "bernoulli"
    scale: float = bounded(1.0, above=0)  # of the gaussian or laplace, in units of the pixels

    def __post_init__(self) -> None:
        if self.likelihood == "bernoulli" and self.scale != 1:
            raise ValueError(f"scale={self.scale} belongs to the likelihoods gaussian and laplace, not to bernoulli")


class Regularized(NamedTuple):
    """The regularizer of a whole step, computed before its micro-batches, and its gradient in their latents."""

    terms: dict[str, Tensor]
    gradient: Posterior  # of one micro-batch, times the number of micro-batches

    def of(self, q: Posterior) -> dict[str, Tensor]:
        """The terms with their gradient in the latents of this micro-batch (Gao et al. 2021)."""
        slopes = [(slope * (latent - latent.detach())).sum() for slope, latent in zip(self.gradient, q, strict=True)]
        return self.terms | {"regularizer": self.terms["regularizer"] + torch.stack(slopes).sum()}


class Objective(nn.Module):
    """Owns the VAE and whatever else its terms need; one module, one backward, one optimiser.

    loss = recon + regularizer, or what a subclass says in its first line. `forward` gives `loss`, the mean over this
    rank's rows of what is minimised (its gradient averaged over ranks is that of the whole batch), and its terms, each
    a scalar in nats per image unless its name says otherwise.
    """

    streams = 1  # independent batches of images that a step consumes
    couples_rows = False  # whether the regularizer is more than a mean over rows

    def __init__(self, config: Config, vae: VAE, world: World, images: int) -> None:
        """images: how many the training set has, which the aggregate posterior is a mean of."""
        super().__init__()
        self.vae, self.world, self.images = vae, world, images
        self.likelihood = Likelihood(config.likelihood, config.scale)
        if config.likelihood == "bernoulli" and vae.pixel_range != (0.0, 1.0):
            low, high = vae.pixel_range
            raise ConfigError(
                f"objective.likelihood=bernoulli needs pixels in [0, 1], this model's lie in [{low:g}, {high:g}]: "
                "set objective.likelihood=gaussian"
            )

    def require_batch(self, batch: int) -> None:
        """Raises ConfigError where the terms are not defined for a step of so many images."""
        if self.couples_rows and batch < 2:
            raise ConfigError("train.batch=1: this objective compares the images of a batch, it needs two at least")

    def posterior(self, images: Tensor, noise: Noise) -> Posterior:
        """q(z | images) and a draw of it."""
        mu, logvar = self.vae.encode(images, noise)
        z = gaussian.sample(mu, logvar, noise.normal("latent", mu.shape[1], mu.dtype))
        return gaussian.Posterior(mu, logvar, z)

    def recon(self, z: Tensor, images: Tensor, noise: Noise) -> Tensor:
        """-log p(images | z), the mean over rows."""
        return self.likelihood.nll(self.vae.decode(z, noise), images).mean()

    def regularizer(self, q: Any, noise: Noise, step: Tensor) -> dict[str, Tensor]:
        """What the loss adds to recon, as `regularizer`, and what else is worth a look, of the rows of all ranks.

        The mean of each over ranks is that of the whole batch. q: what this objective's `posterior` gives. step: how
        many optimiser steps were made, a scalar.
        """
        raise NotImplementedError

    def survey(self, micros: Sequence[Micro], step: Tensor) -> Sequence[Any]:
        """One look at this rank's rows of the whole step, without gradient: what `forward` gets with each micro-batch.

        An objective that couples the rows of a batch does so here, so that accumulation changes nothing.
        """
        if len(micros) == 1 or not self.couples_rows:
            return [None] * len(micros)
        q, noise = self._everything(micros)
        # autocast would compute the backward pass in half precision too
        with torch.enable_grad(), torch.autocast(q.z.device.type, enabled=False):
            leaf = type(q)(*(latent.requires_grad_() for latent in q))
            terms = self.regularizer(leaf, noise, step)
            slopes = torch.autograd.grad(terms["regularizer"], tuple(leaf), materialize_grads=True)
        terms = {name: term.detach() for name, term in terms.items()}
        parts = zip(*((len(micros) * slope).chunk(len(micros)) for slope in slopes), strict=True)
        return [Regularized(terms, type(q)(*part)) for part in parts]

    def forward(self, images: Tensor, noise: Noise, step: Tensor, surveyed: Any) -> dict[str, Tensor]:
        q = self.posterior(images[0], noise)
        recon = self.recon(q.z, images[0], noise)
        terms = self._regularizer(q, noise, step) if surveyed is None else surveyed.of(q)
        loss = recon + terms.pop("regularizer")
        return {"loss": loss, "recon": recon, "kl": q.kl().sum(1).mean()} | terms

    def after_step(self, terms: dict[str, Tensor]) -> None:
        """What follows an optimiser step; terms: the means over this rank's rows."""

    def latents(self, micros: Sequence[Micro]) -> dict[str, Tensor]:
        """`aggregate.report` of the step's whole batch, without gradient; every rank calls it."""
        q, noise = self._everything(micros)
        with torch.autocast(q.z.device.type, enabled=False):
            return aggregate.report(q, noise, self.world, self.images)

    def prior(self, noise: Noise, dtype: torch.dtype) -> Tensor:
        """Draws from p(z), [rows, latent]."""
        return noise.normal("prior", self.vae.latent, dtype)

    def traversal(self, columns: int) -> Tensor:
        """The values at which to look at each latent, [latent, columns]."""
        return torch.linspace(-3, 3, columns).expand(self.vae.latent, columns)

    def nearest(self, z: Tensor) -> Tensor:
        """The codes nearest to z that the decoder learns to read, [rows, latent]."""
        return z

    def param_groups(self) -> Iterator[dict[str, Any]]:
        """A group for every player; `name` is always there, other keys override the recipe's optimiser."""
        yield {"name": "vae", "params": list(self.vae.parameters())}

    def _everything(self, micros: Sequence[Micro]) -> tuple[Posterior, Noise]:
        """This rank's rows of all micro-batches."""
        found = [self.posterior(images[0], noise) for images, noise in micros]
        positions = torch.cat([noise.positions for _, noise in micros])
        return type(found[0])(*map(torch.cat, zip(*found, strict=True))), micros[0][1].at(positions)

    def _regularizer(self, q: Posterior, noise: Noise, step: Tensor) -> dict[str, Tensor]:
        """In the posterior's own precision: half of it would ruin sums over pairs."""
        with torch.autocast(q.z.device.type, enabled=False):
            return self.regularizer(q, noise, step)
