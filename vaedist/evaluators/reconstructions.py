"""Held-out originals, each above its reconstruction from the posterior mean."""

from collections.abc import Iterator

import numpy as np
import torch

from vaedist.evaluators import Picture, Subject

COLUMNS, ROWS = 10, 4


def run(subject: Subject) -> Iterator[tuple[str, Picture]]:
    objective = subject.objective
    images, noise = subject.images(np.arange(min(COLUMNS * ROWS, subject.count)))
    mean = objective.posterior(images, noise).mean
    rebuilt = objective.likelihood.mean(objective.vae.decode(mean, noise))
    pairs = [torch.cat(rows) for rows in zip(images.split(COLUMNS), rebuilt.split(COLUMNS), strict=True)]
    whole = [pair for pair in pairs if len(pair) == 2 * COLUMNS] or pairs[:1]  # an incomplete row would not align
    yield "reconstructions", subject.grid(torch.cat(whole), columns=min(COLUMNS, len(images)))
