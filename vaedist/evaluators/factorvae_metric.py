"""The FactorVAE metric: which latent varies least among images that share a factor, by a vote (Kim & Mnih 2018)."""

from collections.abc import Iterator

import numpy as np

from vaedist.evaluators import Subject
from vaedist.evaluators._ground_truth import TEST, TRAIN, Factor, GroundTruth, generator, ground_truth
from vaedist.evaluators._ground_truth import require as require  # at the start of a run

SHARING = 64  # images of a vote
PRUNED = 0.05  # a latent of less standard deviation has collapsed to the prior


def run(subject: Subject) -> Iterator[tuple[str, float]]:
    yield "factorvae_metric", factorvae_metric(ground_truth(subject))


def factorvae_metric(truth: GroundTruth, train: int = TRAIN, test: int = TEST) -> float:
    """Accuracy of the majority vote, section 4; 0 if every latent is pruned.

    The votes to learn from and those to score are drawn alike, from the same images.
    """
    deviation = truth.codes.std(axis=0, ddof=1)
    active = deviation >= PRUNED
    if not active.any():
        return 0.0
    standard, rng = truth.codes[:, active] / deviation[active], generator()
    learnt, scored = (table(standard, truth.classes.shape[1], *draw(truth, votes, rng)) for votes in (train, test))
    return float(scored[learnt.argmax(axis=0), np.arange(len(scored[0]))].sum() / test)


def draw(truth: GroundTruth, votes: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A factor for each vote, [votes], uniformly, and images that share its value, [votes, SHARING].

    The value is that of an image drawn uniformly among those that share theirs with another.
    """
    factor = rng.integers(truth.classes.shape[1], size=votes)
    images = np.empty((votes, SHARING), dtype=np.int64)
    for k, column in enumerate(truth.classes.T):
        mine, same = factor == k, Factor(column)
        images[mine] = same.alike(same.shared(rng, mine.sum()), rng, SHARING)
    return factor, images


def table(standard: np.ndarray, factors: int, factor: np.ndarray, images: np.ndarray) -> np.ndarray:
    """How often each latent varied least when each factor was shared, [factors, latent]."""
    spread = np.stack([column[images].var(axis=1, ddof=1) for column in standard.T], axis=1)
    latent = spread.shape[1]
    return np.bincount(factor * latent + spread.argmin(axis=1), minlength=factors * latent).reshape(factors, latent)
