"""The interventional robustness score: how still a latent is when all factors but one change (Suter et al. 2019)."""

from collections.abc import Iterator

import numpy as np

from vaedist.evaluators import Subject
from vaedist.evaluators._ground_truth import GroundTruth, ground_truth
from vaedist.evaluators._ground_truth import require as require  # at the start of a run

QUANTILE = 0.99  # of the deviations, where the paper takes the largest


def run(subject: Subject) -> Iterator[tuple[str, float]]:
    yield "irs", irs(ground_truth(subject).sample())


def irs(truth: GroundTruth) -> float:
    """1 - the deviation among images that share a factor, relative to that among all images, of the best factor.

    The mean over latents is weighted by the latter; latents that do not vary are left out, and values that one image
    has alone. 0 if no latent varies.
    """
    codes = truth.codes[:, np.ptp(truth.codes, axis=0) > 0]
    if not codes.shape[1]:
        return 0.0
    largest = np.abs(codes - codes.mean(axis=0)).max(axis=0)
    robust = np.stack([1 - deviation(codes, column) / largest for column in truth.classes.T])  # [factors, latent]
    return float(np.average(robust.max(axis=0), weights=largest))


def deviation(codes: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """How far codes lie from the mean of their class, the mean over classes of the quantile, [latent]."""
    groups = (codes[classes == c] for c in np.flatnonzero(np.bincount(classes) > 1))
    return np.mean([np.quantile(np.abs(z - z.mean(axis=0)), QUANTILE, axis=0) for z in groups], axis=0)
