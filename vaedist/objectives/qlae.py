"""The quantised-latent autoencoder (Hsu et al. 2023)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaedist import objectives
from vaedist.config import bounded
from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.world import World


@dataclass(frozen=True, kw_only=True)
class Config(objectives.Config):
    """The settings of the paper's code, for 3 x 64 x 64 pixels and 10 latents: see `QLAE`."""

    values: int = bounded(10, at_least=2)  # of each latent
    lambda_quantize: float = bounded(12.288, at_least=0)
    lambda_commit: float = bounded(12.288, at_least=0)
    weight_decay: float = bounded(0.1, at_least=0)  # times lr, a step

    def build(self, vae: VAE, world: World, images: int) -> "QLAE":
        return QLAE(self, vae, world, images)


class Code(NamedTuple):
    """q(z | x) of some rows, a point, against the prior that all values are equally likely; [rows, latent] each."""

    mu: Tensor
    quantised: Tensor  # mu's nearest values, with the gradient of the codebook
    z: Tensor  # the same, with the gradient of mu: straight-through
    log_p: Tensor  # of each value, -log(values)

    @property
    def mean(self) -> Tensor:
        return self.z

    @property
    def std(self) -> Tensor:
        return torch.zeros_like(self.z)

    def kl(self) -> Tensor:
        return -self.log_p

    def log_prior(self) -> Tensor:
        return self.log_p

    def log_density(self, z: Tensor) -> Tensor:
        """0 where codes are equal, -inf elsewhere: [n, latent] -> [n, rows, latent]."""
        return (z[:, None] == self.z).to(z.dtype).log()


class Codebook(nn.Module):
    """The values that each latent may take, [latent, values]; a module, so that ZeRO sees when they are needed."""

    def __init__(self, latent: int, values: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.linspace(-0.5, 0.5, values).repeat(latent, 1))

    def forward(self, mu: Tensor) -> Tensor:
        """The value nearest to each mu, [rows, latent], with the gradient of the values alone."""
        nearest = (mu.detach()[:, :, None] - self.values).abs().argmin(2)
        # not by indexing, whose gradient a GPU sums in any order
        return (F.one_hot(nearest, self.values.shape[1]) * self.values).sum(2)


class QLAE(objectives.Objective):
    """loss = recon + lambda_quantize * ||sg(mu) - z||^2 + lambda_commit * ||mu - sg(z)||^2

    Each latent has a codebook of its own, `values` learnable scalars; z is the nearest to the encoder's mu, and the
    decoder's gradient at z is mu's (straight-through). The encoder's logvar is not used. As in the paper's code the
    weights of the VAE decay (decoupled from Adam), its biases and the codebook do not.

    The paper's code takes the mean over pixels of the reconstruction's cross-entropy and the mean over latents of the
    squares, each lambda 0.01; here all are sums, so that its lambda counts pixels / latents times as much:
    0.01 * 12,288 / 10 = 12.288. (It also clips each gradient at 1 of those means, which is left out.)

    Code and prior are those of a VAE whose posterior is a point: kl = latents * log(values), and recon + kl is its
    negative ELBO, the mi of the decomposition is the entropy of the code, dwkl what the values' frequencies lack of
    uniform.
    """

    def __init__(self, config: Config, vae: VAE, world: World, images: int) -> None:
        super().__init__(config, vae, world, images)
        self.lambda_quantize, self.lambda_commit = config.lambda_quantize, config.lambda_commit
        self.weight_decay = config.weight_decay
        self.values = config.values
        self.codebook = Codebook(vae.latent, config.values)

    def posterior(self, images: Tensor, noise: Noise) -> Code:
        mu, _ = self.vae.encode(images, noise)
        quantised = self.codebook(mu)
        z = quantised.detach() + (mu - mu.detach())
        return Code(mu, quantised, z, torch.full_like(z, -math.log(self.values)))

    def regularizer(self, q: Code, noise: Noise, step: Tensor) -> dict[str, Tensor]:
        quantize = (q.mu.detach() - q.quantised).square().sum(1).mean()
        commit = (q.mu - q.quantised.detach()).square().sum(1).mean()
        regularizer = self.lambda_quantize * quantize + self.lambda_commit * commit
        return {"regularizer": regularizer, "quantize": quantize, "commit": commit}

    def prior(self, noise: Noise, dtype: torch.dtype) -> Tensor:
        drawn = noise.bits("prior", self.vae.latent) % self.values
        return self.codebook.values.T.gather(0, drawn).to(dtype)

    def traversal(self, columns: int) -> Tensor:
        """The codebook in order; of more values than columns some, of fewer some twice."""
        chosen = torch.linspace(0, self.values - 1, columns).round().long()
        return self.codebook.values.sort(1).values[:, chosen]

    def nearest(self, z: Tensor) -> Tensor:
        return self.codebook(z)

    def param_groups(self) -> Iterator[dict[str, Any]]:
        weights = [parameter for parameter in self.vae.parameters() if parameter.ndim > 1]
        biases = [parameter for parameter in self.vae.parameters() if parameter.ndim <= 1]
        yield {"name": "weights", "params": weights, "weight_decay": self.weight_decay}
        yield {"name": "biases and codebook", "params": [*biases, self.codebook.values]}
