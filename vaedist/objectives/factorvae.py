"""FactorVAE (Kim & Mnih 2018, Algorithm 2)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaedist import objectives
from vaedist.branch import beside
from vaedist.config import bounded
from vaedist.layers import WideLinear, frozen
from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.posterior import Posterior
from vaedist.world import World

PARTS = "_encode", "_elbo", "_match", "_tc"  # each of which torch.compile takes by itself


@dataclass(frozen=True, kw_only=True)
class Discriminator:
    """The density-ratio network and its Adam (Kim & Mnih 2018, appendix A; lr 1e-4 for dSprites)."""

    layers: int = bounded(6, at_least=1)
    width: int = bounded(1000, at_least=1)
    lr: float = bounded(1e-5, above=0)
    betas: tuple[float, float] = bounded((0.5, 0.9), at_least=0, below=1)

    def build(self, latent: int) -> nn.Sequential:
        """An MLP [rows, latent] -> two logits: z is from q(z), z is from the product of its marginals."""
        widths = [latent] + [self.width] * self.layers
        hidden = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.LeakyReLU(0.2))]
        return nn.Sequential(*hidden, WideLinear(self.width, 2))


@dataclass(frozen=True, kw_only=True)
class Config(objectives.Config):
    gamma: float = bounded(6.4, at_least=0)
    discriminator: Discriminator = Discriminator()

    def build(self, vae: VAE, world: World, images: int) -> "FactorVAE":
        return FactorVAE(self, vae, world, images)


class FactorVAE(objectives.Objective):
    """loss = recon + kl + gamma * tc + discriminator, each player moved by its own terms alone.

    tc is the density-ratio estimate E_q(z)[log D(z) / (1 - D(z))] (eq. 3), with D frozen. The discriminator's
    cross-entropy sees z of this batch and permuted latents of an independent second batch, both without gradient to the
    encoder. The two updates are simultaneous: Algorithm 2 encodes the second batch with the VAE it has just updated,
    here both players' gradients are taken at the weights before the step.
    """

    streams = 2
    couples_rows = True

    def __init__(self, config: Config, vae: VAE, world: World, images: int) -> None:
        super().__init__(config, vae, world, images)
        self.gamma, self.player = config.gamma, config.discriminator
        self.discriminator = config.discriminator.build(vae.latent)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """In parts: of a whole nothing could go on beside the rest."""
        for part in PARTS:
            setattr(self, part, torch.compile(getattr(self, part), *args, **kwargs))

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which are not compiled: these parts compute with the weights of this one."""
        return {name: value for name, value in super().__getstate__().items() if name not in PARTS}

    def survey(self, micros: Sequence[objectives.Micro], step: Tensor) -> Sequence[Tensor]:
        """Samples of the product of marginals for all rows of the step: the second batch's z, permuted over it all."""
        return beside(self._permuted, micros).value  # for the players, beside

    def _permuted(self, micros: Sequence[objectives.Micro]) -> Sequence[Tensor]:
        z = torch.stack([self._encode(images[1], noise.fork("second batch")).z for images, noise in micros])
        positions = torch.stack([noise.positions for _, noise in micros])
        return self.world.permute_dims(z, micros[0][1].at(positions)).unbind()

    def forward(self, images: Tensor, noise: Noise, step: Tensor, surveyed: Any) -> dict[str, Tensor]:
        q = self._encode(images[0], noise)
        game = beside(self._play, q.z, surveyed)
        recon, kl = self._elbo(q, images[0], noise)
        discriminator, accuracy, tc = game.result()
        return {
            "loss": recon + kl + self.gamma * tc + discriminator,
            "recon": recon,
            "kl": kl,
            "tc": tc,
            "discriminator": discriminator,
            "discriminator_accuracy": accuracy,
        }

    def _encode(self, images: Tensor, noise: Noise) -> Posterior:
        return self.posterior(images, noise)

    def _elbo(self, q: Posterior, images: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        return self.recon(q.z, images, noise), q.kl().sum(1).mean()

    def _play(self, z: Tensor, permuted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tc last, so that its gradient comes first: the encoder waits for it, and for no other of these."""
        return *self._match(z.detach(), permuted), self._tc(z)

    def _match(self, z: Tensor, permuted: Tensor) -> tuple[Tensor, Tensor]:
        """The discriminator's cross-entropy and its accuracy."""
        logits = self.discriminator(torch.cat([z, permuted]))
        label = torch.arange(2, device=logits.device).repeat_interleave(len(permuted))
        accuracy = (logits.argmax(1) == label).to(z.dtype).mean()
        return F.cross_entropy(logits, label), accuracy

    def _tc(self, z: Tensor) -> Tensor:
        joint, product = frozen(self.discriminator, z).unbind(1)
        return (joint - product).mean()

    def param_groups(self) -> Iterator[dict[str, Any]]:
        yield from super().param_groups()
        parameters = list(self.discriminator.parameters())
        yield {"name": "discriminator", "params": parameters, "lr": self.player.lr, "betas": self.player.betas}
