"""From one held-out face to another, in a straight line and on an arc between their posterior means."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vaedist import pictures
from vaedist.evaluators import Subject
from vaedist.pictures import Picture

PAIRS, STEPS = 4, 9


def run(subject: Subject) -> Iterator[tuple[str, Picture]]:
    pairs = min(PAIRS, subject.count // 2)
    if not pairs:
        return
    originals, _ = subject.images(np.arange(2 * pairs))
    means = subject.codes().mean[: 2 * pairs]
    t = torch.linspace(0, 1, STEPS).to(means)
    paths = [path(a, b, t) for a, b in means.unflatten(0, (pairs, 2)) for path in (linear, spherical)]
    between = subject.expected(torch.cat(paths)).unflatten(0, (2 * pairs, STEPS))
    ends = originals.unflatten(0, (pairs, 2)).repeat_interleave(2, 0)  # [2 * pairs, 2, C, H, W]
    tiles = subject.tiles(torch.cat([ends[:, :1], between, ends[:, 1:]], 1).flatten(0, 1), STEPS + 2)
    columns = ["original", *(pictures.number(value) for value in t.tolist()), "original"]
    caption = subject.caption("interpolation between the posterior means of two held-out images")
    yield "interpolation", pictures.grid(tiles, caption, rows=["linear", "spherical"] * pairs, columns=columns, group=2)


def linear(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """[latent] twice and [steps] -> [steps, latent]."""
    return a + t[:, None] * (b - a)


def spherical(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """The same along the great circle (Shoemake 1985), with lengths that go from |a| to |b| (White 2016)."""
    angle = torch.arccos(torch.nn.functional.cosine_similarity(a, b, dim=0).clamp(-1, 1))
    if angle.sin() < 1e-4:  # no arc, or any
        return linear(a, b, t)
    return (torch.sin((1 - t) * angle)[:, None] * a + torch.sin(t * angle)[:, None] * b) / angle.sin()
