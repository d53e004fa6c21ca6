"""One latent a row, the most informative first, moved over its range around the posterior mean of a held-out image."""

from collections.abc import Iterator

import numpy as np
import torch

from vaedist.evaluators import Picture, Subject

COLUMNS, ROWS = 11, 16


def run(subject: Subject) -> Iterator[tuple[str, Picture]]:
    objective = subject.objective
    order = subject.codes().kl().double().mean(0).argsort(descending=True)[:ROWS]
    image, noise = subject.images(np.zeros(1, dtype=np.int64))
    mean = objective.posterior(image, noise).mean
    z = mean.repeat(len(order), COLUMNS, 1)  # [row, column, latent]
    z[torch.arange(len(order), device=z.device), :, order] = objective.traversal(COLUMNS).to(z)[order]
    z = z.flatten(0, 1)
    decoded = objective.vae.decode(z, subject.noise(np.zeros(len(z), dtype=np.int64)))
    yield "traversals", subject.grid(objective.likelihood.mean(decoded), COLUMNS)
