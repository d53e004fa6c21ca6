"""One latent a row, the most informative first, moved over its range around the posterior mean of a held-out image."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from vaedist.evaluators import Picture, Subject

COLUMNS, ROWS, IMAGES = 11, 16, 1024


def run(subject: Subject) -> Iterator[tuple[str, Picture]]:
    objective = subject.objective
    order = kl_per_latent(subject).argsort(descending=True)[:ROWS]
    image, noise = subject.images(np.zeros(1, dtype=np.int64))
    mean = objective.posterior(image, noise).mean
    z = mean.repeat(len(order), COLUMNS, 1)  # [row, column, latent]
    z[torch.arange(len(order), device=z.device), :, order] = objective.traversal(COLUMNS).to(z)[order]
    z = z.flatten(0, 1)
    decoded = objective.vae.decode(z, subject.noise(np.zeros(len(z), dtype=np.int64)))
    yield "traversals", subject.grid(objective.likelihood.mean(decoded), COLUMNS)


def kl_per_latent(subject: Subject) -> Tensor:
    """Mean KL of every latent over up to `IMAGES` held-out images, float64 [latent], the same on every rank."""
    count = min(IMAGES, subject.count)
    total = torch.zeros(subject.objective.vae.latent, dtype=torch.float64, device=subject.backend.device)
    for images, noise in subject.share(count):
        total += subject.objective.posterior(images, noise).kl().double().sum(0)
    return subject.world.sum(total) / count
