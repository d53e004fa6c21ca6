"""What is minimised, one file per objective: `Config.build(vae, world)` gives an `Objective`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vaedist import gaussian
from vaedist.config import ConfigError, bounded
from vaedist.likelihood import Family, Likelihood
from vaedist.models import VAE
from vaedist.noise import Noise
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


class Objective(nn.Module):
    """Owns the VAE and whatever else its terms need; one module, one backward, one optimiser.

    `forward` gives `loss`, the mean over this rank's rows of what is minimised (its gradient averaged over ranks is
    that of the whole batch), and its terms, each a scalar in nats per image unless its name says otherwise. `streams`
    is how many independent batches of images a step consumes.
    """

    streams = 1

    def __init__(self, config: Config, vae: VAE, world: World) -> None:
        super().__init__()
        self.vae, self.world = vae, world
        self.likelihood = Likelihood(config.likelihood, config.scale)
        if config.likelihood == "bernoulli" and vae.pixel_range != (0.0, 1.0):
            low, high = vae.pixel_range
            raise ConfigError(
                f"objective.likelihood=bernoulli needs pixels in [0, 1], this model's lie in [{low:g}, {high:g}]: "
                "set objective.likelihood=gaussian"
            )

    def posterior(self, images: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """mu, logvar and a draw z of q(z | images), [local, latent] each."""
        mu, logvar = self.vae.encode(images, noise)
        return mu, logvar, gaussian.sample(mu, logvar, noise.normal("latent", mu.shape[1], mu.dtype))

    def negative_elbo(self, images: Tensor, noise: Noise) -> tuple[Tensor, Tensor, Tensor]:
        """recon and kl, the two terms of the negative ELBO (Kingma & Welling 2014, eq. 3), and the draw z."""
        mu, logvar, z = self.posterior(images, noise)
        recon = self.likelihood.nll(self.vae.decode(z, noise), images).mean()
        return recon, gaussian.kl(mu, logvar).sum(1).mean(), z

    def survey(self, micros: Sequence[Micro]) -> Sequence[Any]:
        """One look at this rank's rows of the whole step, without gradient: what `forward` gets with each micro-batch.

        An objective that couples the rows of a batch does so here, so that accumulation changes nothing.
        """
        return [None] * len(micros)

    def forward(self, images: Tensor, noise: Noise, surveyed: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def param_groups(self) -> Iterator[dict[str, Any]]:
        """A group for every player; `name` is always there, other keys override the recipe's optimiser."""
        yield {"name": "vae", "params": list(self.vae.parameters())}
