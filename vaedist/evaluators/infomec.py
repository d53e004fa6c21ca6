"""InfoMEC: modularity, compactness and explicitness in terms of information (Hsu et al. 2023)."""

import warnings
from collections.abc import Iterator

import numpy as np

from vaedist.evaluators import Subject
from vaedist.evaluators._ground_truth import (
    GroundTruth,
    each_factor,
    entropy,
    ground_truth,
    mutual_information,
)
from vaedist.evaluators._ground_truth import require as require  # at the start of a run
from vaedist.world import World

NEIGHBOURS = 10  # of the estimate of mutual information
PRUNED = 1 / 20  # a latent whose range is a smaller share of the largest


def run(subject: Subject) -> Iterator[tuple[str, float]]:
    truth = ground_truth(subject).sample()
    nmi = normalised_information(truth, subject.world)
    yield "infom", concentration(nmi)
    yield "infoc", concentration(nmi.T)
    yield "infoe", infoe(truth, subject.world)


def concentration(nmi: np.ndarray) -> float:
    """The largest share of a row's sum, the mean over rows, from 0 where all are equal to 1; 0 if none is known."""
    if nmi.shape[0] == 0 or nmi.shape[1] < 2:
        return 0.0
    chance, sums = 1 / nmi.shape[1], nmi.sum(axis=1)
    shares = np.divide(nmi.max(axis=1), sums, out=np.full(len(nmi), chance), where=sums > 0)
    return float((shares.mean() - chance) / (1 - chance))


def normalised_information(truth: GroundTruth, world: World = World()) -> np.ndarray:  # noqa: B008
    """Mutual information of each active latent and factor, as a share of the factor's entropy: [active, factors].

    Of a quantised code from the frequencies, else from nearest neighbours (Ross 2014).
    """
    from sklearn.feature_selection import mutual_info_classif

    ranges, discrete = np.ptp(truth.codes, axis=0), quantised(truth.codes)
    codes = truth.codes[:, ranges > (0 if discrete else PRUNED * ranges.max())]
    if not codes.shape[1]:
        return np.empty((0, truth.classes.shape[1]))
    if discrete:
        which = [np.unique(column, return_inverse=True)[1] for column in codes.T]
        return mutual_information(np.stack(which, axis=1), truth.classes) / entropy(truth.classes)

    def information(k: int) -> np.ndarray:
        return mutual_info_classif(
            codes, truth.classes[:, k], discrete_features=False, n_neighbors=NEIGHBOURS, random_state=0
        )

    return np.stack(each_factor(world, truth.classes.shape[1], information), axis=1) / entropy(truth.classes)


def infoe(truth: GroundTruth, world: World = World()) -> float:  # noqa: B008
    """What a linear model of the code says of a factor, as a share of its entropy; the mean over factors.

    Predictive V-information (Xu et al. 2020) of the images that the model is fitted to: of a discrete factor by
    logistic regression, of a continuous one the coefficient of determination. Neither is regularised or weighted.
    """
    from sklearn.linear_model import LinearRegression
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    encoder = OneHotEncoder(sparse_output=False) if quantised(truth.codes) else StandardScaler()
    codes, entropies = encoder.fit_transform(truth.codes), entropy(truth.classes)

    def explained(k: int) -> float:
        if truth.continuous[k]:
            return float(LinearRegression().fit(codes, truth.values[:, k]).score(codes, truth.values[:, k]))
        return 1 - cross_entropy(codes, truth.classes[:, k]) / entropies[k]

    return float(np.mean(each_factor(world, truth.classes.shape[1], explained)))


def cross_entropy(codes: np.ndarray, classes: np.ndarray) -> float:
    """Of the best logistic regression, in nats."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    with warnings.catch_warnings():  # classes that a code separates are told ever better by ever larger weights
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=np.inf).fit(codes, classes)
    return float(log_loss(classes, model.predict_proba(codes), labels=model.classes_))


def quantised(codes: np.ndarray) -> bool:
    """Whether images share codes, so many that the nearest neighbours of a latent's value would all be equal to it."""
    return max(len(np.unique(column)) for column in codes.T) * NEIGHBOURS <= len(codes)
