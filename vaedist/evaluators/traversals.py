"""Latents, the most informative first, each moved over its range around the posterior mean of a held-out image."""

from collections.abc import Iterator

import torch
from torch import Tensor

from vaedist import pictures
from vaedist.evaluators import Subject
from vaedist.pictures import Picture

LATENTS, COLUMNS, FRAMES, FACES = 16, 11, 13, 3


def run(subject: Subject) -> Iterator[tuple[str, Picture]]:
    q = subject.codes()
    kl = q.kl().double().mean(0)
    order = kl.argsort(descending=True, stable=True)[:LATENTS]
    names = [f"z{latent}" for latent in order.tolist()]
    caption = subject.caption("latent traversals, ordered by KL (nats per image)")

    values = subject.objective.traversal(COLUMNS)
    alike = bool((values == values[0]).all())  # each latent may have values of its own
    columns = [pictures.number(value) if alike else f"{n}" for n, value in enumerate(values[0].tolist(), 1)]
    tiles = subject.tiles(subject.expected(traversed(q.mean[0], order, values)), COLUMNS)
    rows = [f"{name}  KL {kl[latent]:.2f}" for name, latent in zip(names, order, strict=True)]
    yield "traversals", pictures.grid(tiles, caption, rows=rows, columns=columns)

    values = subject.objective.traversal(FRAMES)
    moved = torch.stack([traversed(mean, order, values) for mean in q.mean[:FACES]])  # [face, latent * frame, latent]
    tiles = subject.tiles(subject.expected(moved.flatten(0, 1)), FRAMES).swapaxes(0, 1)  # [frame, face * latent, ...]
    frames = tiles.reshape(FRAMES, len(moved), len(order), *tiles.shape[2:])
    yield (
        "traversals_animation",
        pictures.there_and_back([pictures.grid(frame, caption, columns=names) for frame in frames]),
    )


def traversed(mean: Tensor, order: Tensor, values: Tensor) -> Tensor:
    """A code with the latents of `order` at each of their values, one at a time: [len(order) * columns, latent]."""
    z = mean.repeat(len(order), values.shape[1], 1)
    z[torch.arange(len(order), device=z.device), :, order] = values.to(z)[order]
    return z.flatten(0, 1)
