"""An objective around a VAE small enough for many proofs, and one step of it, without the optimiser."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from vaedist.layers import BatchNorm2d, Dropout, Sequential, WideLinear
from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.objectives import Micro, Objective
from vaedist.world import World

SHAPE, LATENT, ROWS, IMAGES = (3, 8, 8), 5, 12, 50
STEP = torch.tensor(3.0, dtype=torch.float64)
NETWORKS: dict[str, dict[str, Any]] = {"plain": {}, "dropout": {"dropout": 0.3}, "batch norm": {"batch_norm": True}}


def small_vae(world: World, *, dropout: float = 0.0, batch_norm: bool = False) -> VAE:
    torch.manual_seed(0)

    def tail(name: str) -> list[nn.Module]:
        return [nn.ReLU(), *([BatchNorm2d(6, world)] if batch_norm else []), Dropout(dropout, name)]

    encoder = Sequential(
        nn.Conv2d(3, 6, 4, stride=2, padding=1), *tail("encoder"), nn.Flatten(), WideLinear(6 * 4 * 4, 2 * LATENT)
    )
    decoder = Sequential(
        nn.Linear(LATENT, 6 * 4 * 4), nn.Unflatten(1, (6, 4, 4)), *tail("decoder"),
        nn.ConvTranspose2d(6, 3, 4, stride=2, padding=1),
    )  # fmt: skip
    with torch.no_grad():
        encoder[-1].weight.mul_(2 if batch_norm else 16)  # posteriors that differ from each other and from the prior
    return VAE(encoder, decoder, latent=LATENT)


def config(name: str, **settings: Any) -> Any:
    return import_module(f"vaedist.objectives.{name}").Config(**settings)


def small(name: str, network: str = "plain", world: World = World(), **settings: Any) -> Objective:  # noqa: B008
    """An objective in float64; the same weights at every call."""
    vae = small_vae(world, **NETWORKS[network])
    return config(name, **settings).build(vae, world, IMAGES).double()


def micro_batches(streams: int, parts: int = 1, rows: int = ROWS, first: int = 2 * ROWS) -> list[Micro]:
    """The rows of one step at the positions from `first` on, in so many parts, on one process."""
    generator = torch.Generator().manual_seed(first)
    images = torch.rand(streams, rows, *SHAPE, dtype=torch.float64, generator=generator)
    positions = torch.arange(first, first + rows)
    return [(part, Noise(7, where)) for part, where in zip(images.chunk(parts, 1), positions.chunk(parts), strict=True)]


def step(objective: Objective, micros: Sequence[Micro]) -> dict[str, Tensor]:
    """One step as the trainer makes it: the mean of every term, and in `grad` the gradient of the mean loss."""
    objective.zero_grad()
    with torch.no_grad():
        surveyed = objective.survey(micros, STEP)
        objective.latents(micros)
    found = []
    for (images, noise), survey in zip(micros, surveyed, strict=True):
        terms = objective(images, noise, STEP, survey)
        (terms["loss"] / len(micros)).backward()
        found.append({name: term.detach() for name, term in terms.items()})
    return {name: torch.stack([terms[name] for terms in found]).mean() for name in found[0]}
