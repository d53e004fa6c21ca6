"""The mutual information gap: how much more the best latent knows of a factor than the second (Chen et al. 2018)."""

from collections.abc import Iterator

import numpy as np

from vaedist.evaluators import Subject
from vaedist.evaluators._ground_truth import GroundTruth, discretise, entropy, ground_truth, mutual_information
from vaedist.evaluators._ground_truth import require as require  # at the start of a run


def run(subject: Subject) -> Iterator[tuple[str, float]]:
    yield "mig", mig(ground_truth(subject).sample())


def mig(truth: GroundTruth) -> float:
    """The gap as a share of the factor's entropy, the mean over factors (equation 6), of codes in 20 bins."""
    mi = np.sort(mutual_information(discretise(truth.codes), truth.classes), axis=0)
    return float(((mi[-1] - mi[-2]) / entropy(truth.classes)).mean())
