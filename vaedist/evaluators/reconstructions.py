"""Held-out originals, each above its reconstruction from the posterior mean."""

from collections.abc import Iterator

import numpy as np
import torch

from vaedist import pictures
from vaedist.evaluators import Subject
from vaedist.pictures import Picture

COLUMNS, ROWS = 10, 4


def run(subject: Subject) -> Iterator[tuple[str, Picture]]:
    columns = min(COLUMNS, subject.count)
    rows = min(ROWS, subject.count // columns)  # an incomplete row would not align
    originals, noise = subject.images(np.arange(rows * columns))
    rebuilt = subject.expected(subject.objective.posterior(originals, noise).mean)
    pairs = torch.stack([originals.unflatten(0, (rows, columns)), rebuilt.unflatten(0, (rows, columns))], 1)
    caption = subject.caption("held-out images and their reconstructions from the posterior mean")
    tiles = subject.tiles(pairs.flatten(0, 2), columns)
    yield "reconstructions", pictures.grid(tiles, caption, rows=["original", "reconstruction"] * rows, group=2)
