"""Images decoded from the prior and from the aggregate posterior, from the same draws at every evaluation."""

from collections.abc import Iterator

import numpy as np

from vaedist import pictures
from vaedist.evaluators import Subject
from vaedist.pictures import Picture

COLUMNS, ROWS = 10, 8


def run(subject: Subject) -> Iterator[tuple[str, Picture]]:
    """A draw from the aggregate posterior is one from q(z | x) of a held-out image x, itself drawn at random."""
    noise = subject.noise(np.arange(COLUMNS * ROWS))
    prior = subject.objective.prior(noise, subject.backend.dtype)
    drawn = noise.bits("images", 1)[:, 0].remainder(subject.count)
    images, _ = subject.images(drawn.cpu().numpy())
    for name, what, z in (
        ("samples", "the prior", prior),
        ("samples_aggregate", "the aggregate posterior", subject.objective.posterior(images, noise).z),
    ):
        tiles = subject.tiles(subject.expected(z), COLUMNS)
        yield name, pictures.grid(tiles, subject.caption(f"decoded from {what}"))
