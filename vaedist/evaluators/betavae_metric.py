"""The beta-VAE metric: which factor two images share, told from how far their codes differ (Higgins et al. 2017)."""

from collections.abc import Iterator

import numpy as np
from threadpoolctl import threadpool_limits

from vaedist.evaluators import Subject
from vaedist.evaluators._ground_truth import TEST, TRAIN, Factor, GroundTruth, generator, ground_truth
from vaedist.evaluators._ground_truth import require as require  # at the start of a run

PAIRS = 64  # of a point


def run(subject: Subject) -> Iterator[tuple[str, float]]:
    yield "betavae_metric", betavae_metric(ground_truth(subject))


def betavae_metric(truth: GroundTruth, train: int = TRAIN, test: int = TEST) -> float:
    """Accuracy of a logistic regression on points that it was not fitted to, from pairs of the same images."""
    from sklearn.linear_model import LogisticRegression

    rng = generator()
    (points, shared), (others, answer) = (differences(truth, count, rng) for count in (train, test))
    with threadpool_limits(limits=1):  # see each_factor
        told = LogisticRegression(max_iter=1000).fit(points, shared).predict(others)
    return float((told == answer).mean())


def differences(truth: GroundTruth, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points mean |z1 - z2| over PAIRS of two images, [count, latent], and the factor that these share, [count]."""
    factor = rng.integers(truth.classes.shape[1], size=count)
    points = np.empty((count, truth.codes.shape[1]))
    for k, column in enumerate(truth.classes.T):
        mine, same = factor == k, Factor(column)
        first = same.shared(rng, (mine.sum(), PAIRS))
        second = same.other(first, rng)
        points[mine] = np.stack([np.abs(z[first] - z[second]).mean(axis=1) for z in truth.codes.T], axis=1)
    return points, factor
