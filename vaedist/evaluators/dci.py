"""Disentanglement, completeness and informativeness of a code (Eastwood & Williams 2018)."""

from collections.abc import Iterator

import numpy as np

from vaedist.evaluators import Subject
from vaedist.evaluators._ground_truth import GroundTruth, each_factor, ground_truth, require_split
from vaedist.world import World

require = require_split  # asked at the start of a run


def run(subject: Subject) -> Iterator[tuple[str, float]]:
    for name, found in dci(*ground_truth(subject).split(), subject.world).items():
        yield f"dci_{name}", found


def dci(train: GroundTruth, test: GroundTruth, world: World = World()) -> dict[str, float]:  # noqa: B008
    """From gradient-boosted trees that tell the class of each factor from the code, as in disentanglement_lib.

    informativeness: their accuracy. The importance of a latent is by how much its splits lower the trees' loss.
    """
    from sklearn.ensemble import GradientBoostingClassifier

    def fit(k: int) -> tuple[np.ndarray, float, float]:
        trees = GradientBoostingClassifier(random_state=0).fit(train.codes, train.classes[:, k])
        accuracies = (trees.score(part.codes, part.classes[:, k]) for part in (train, test))
        return trees.feature_importances_.clip(min=0), *accuracies  # rounding makes some -1e-17

    importances, fitted, scored = zip(*each_factor(world, train.classes.shape[1], fit), strict=True)
    importance = np.stack(importances, axis=1)  # [latent, factors]
    return {
        "disentanglement": concentration(importance),
        "completeness": concentration(importance.T),
        "informativeness": float(np.mean(scored)),
        "informativeness_train": float(np.mean(fitted)),
    }


def concentration(importance: np.ndarray) -> float:
    """1 - the entropy of each row in units of its maximum, the mean weighted by the rows' sums; 0 if all is 0."""
    from scipy.special import entr

    sums = importance.sum(axis=1, keepdims=True)
    if not sums.any():
        return 0.0
    shares = np.divide(importance, sums, out=np.zeros_like(importance), where=sums > 0)
    rows = 1 - entr(shares).sum(axis=1) / np.log(importance.shape[1])
    return float((rows * sums[:, 0]).sum() / sums.sum())
