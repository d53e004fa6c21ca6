"""SAP: how much better the best latent alone predicts a factor than the second (Kumar et al. 2018)."""

from collections.abc import Iterator

import numpy as np

from vaedist.evaluators import Subject
from vaedist.evaluators._ground_truth import GroundTruth, each_factor, ground_truth, require_split
from vaedist.world import World

require = require_split  # asked at the start of a run


def run(subject: Subject) -> Iterator[tuple[str, float]]:
    yield "sap", sap(*ground_truth(subject).split(), subject.world)


def sap(train: GroundTruth, test: GroundTruth, world: World = World()) -> float:  # noqa: B008
    """The mean gap of the two best scores of a factor (section 3).

    A latent's score is the squared correlation with a continuous factor, and of a discrete one the accuracy of a linear
    support vector machine on images that it was not fitted to.
    """

    def scores(k: int) -> np.ndarray:
        return correlations(train, k) if train.continuous[k] else accuracies(train, test, k)

    ordered = np.sort(each_factor(world, train.classes.shape[1], scores), axis=1)  # [factors, latent]
    return float((ordered[:, -1] - ordered[:, -2]).mean())


def correlations(train: GroundTruth, k: int) -> np.ndarray:
    """Squared, of every latent with factor k, [latent]; 0 of a latent that does not vary."""
    codes, values = train.codes - train.codes.mean(axis=0), train.values[:, k] - train.values[:, k].mean()
    variances = (codes**2).mean(axis=0)
    known = (codes * values[:, None]).mean(axis=0) ** 2
    return np.divide(known, variances * (values**2).mean(), out=np.zeros_like(known), where=variances > 1e-12)


def accuracies(train: GroundTruth, test: GroundTruth, k: int) -> np.ndarray:
    """Of the class of factor k as told from every latent alone, [latent]."""
    from sklearn.svm import LinearSVC

    found = []
    for seen, unseen in zip(train.codes.T[:, :, None], test.codes.T[:, :, None], strict=True):
        machine = LinearSVC(C=0.01, class_weight="balanced", dual=False).fit(seen, train.classes[:, k])
        found.append(machine.score(unseen, test.classes[:, k]))
    return np.array(found)
