"""Modularity, whether a latent knows of one factor only, and explicitness, whether a code tells it linearly.

Ridgeway & Mozer 2018, section 3.
"""

from collections.abc import Iterator

import numpy as np

from vaedist.evaluators import Subject
from vaedist.evaluators._ground_truth import (
    GroundTruth,
    discretise,
    each_factor,
    ground_truth,
    mutual_information,
    require_split,
)
from vaedist.world import World

require = require_split  # asked at the start of a run


def run(subject: Subject) -> Iterator[tuple[str, float]]:
    train, test = ground_truth(subject).split()
    yield "modularity", modularity(train)
    yield "explicitness", explicitness(train, test, subject.world)


def modularity(truth: GroundTruth) -> float:
    """1 - what a latent knows of the other factors, squared, relative to that of its own; the mean over latents.

    A latent that knows of none counts 0, as in disentanglement_lib. Mutual information is that of codes in 20 bins.
    """
    mi = mutual_information(discretise(truth.codes), truth.classes) ** 2  # [latent, factors]
    best = mi.max(axis=1)
    others = (mi.sum(axis=1) - best) / (mi.shape[1] - 1)
    return float((1 - np.divide(others, best, out=np.ones_like(best), where=best > 0)).mean())


def explicitness(train: GroundTruth, test: GroundTruth, world: World = World()) -> float:  # noqa: B008
    """Area under the ROC curve of a logistic regression, one class against the others, on images it was not fitted to.

    The mean over the classes of a factor that are in both parts, then over factors; chance is 0.5.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    mean, deviation = train.codes.mean(axis=0), train.codes.std(axis=0)
    seen, unseen = ((part.codes - mean) / np.where(deviation > 0, deviation, 1) for part in (train, test))

    def area(k: int) -> float:
        model = LogisticRegression(max_iter=1000).fit(seen, train.classes[:, k])
        told = dict(zip(model.classes_, model.predict_proba(unseen).T, strict=True))
        truth = test.classes[:, k]
        return float(np.mean([roc_auc_score(truth == c, told[c]) for c in np.intersect1d(truth, model.classes_)]))

    return float(np.mean(each_factor(world, train.classes.shape[1], area)))
