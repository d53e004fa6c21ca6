"""Images decoded from the prior, from the same latents at every evaluation of every run with this latent size."""

from collections.abc import Iterator

import numpy as np

from vaedist.evaluators import Picture, Subject

COLUMNS, ROWS = 10, 8


def run(subject: Subject) -> Iterator[tuple[str, Picture]]:
    objective = subject.objective
    noise = subject.noise(np.arange(COLUMNS * ROWS))
    z = objective.prior(noise, subject.backend.dtype)
    yield "samples", subject.grid(objective.likelihood.mean(objective.vae.decode(z, noise)), COLUMNS)
