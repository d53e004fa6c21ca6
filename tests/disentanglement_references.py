"""The disentanglement metrics written out from their definitions, one image, latent and factor at a time."""

import math
from collections import Counter
from itertools import product

import numpy as np


def variance(numbers):
    mean = math.fsum(numbers) / len(numbers)
    return math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)


def factorvae(codes, learn, score):
    """Kim & Mnih 2018, section 4; learn, score: (factor, images) of every vote."""
    spread = [math.sqrt(variance(column)) for column in codes.T]
    active = [d for d, deviation in enumerate(spread) if deviation >= 0.05]

    def least(images):
        return min(active, key=lambda d: variance([codes[i, d] / spread[d] for i in images]))

    votes = Counter((least(images), factor) for factor, images in learn)
    factors = sorted({factor for factor, _ in learn})
    majority = {d: max(factors, key=lambda k: votes[d, k]) for d in active}
    return sum(majority[least(images)] == factor for factor, images in score) / len(score)


def mutual_information(first, second):
    count, joint = len(first), Counter(zip(first, second, strict=True))
    left, right = Counter(first), Counter(second)
    return sum(c / count * math.log(c * count / (left[a] * right[b])) for (a, b), c in joint.items())


def binned(numbers):
    low, high = min(numbers), max(numbers)
    return [min(19, int(20 * (number - low) / (high - low))) if high > low else 0 for number in numbers]


def information(codes, classes):
    """[latent][factor]"""
    return [[mutual_information(binned(z), list(y)) for y in classes.T.tolist()] for z in codes.T.tolist()]


def mig(codes, classes):
    """Chen et al. 2018, equation 6."""
    gaps = []
    for k, of_latents in enumerate(zip(*information(codes, classes), strict=True)):
        second, first = sorted(of_latents)[-2:]
        gaps.append((first - second) / mutual_information(classes[:, k].tolist(), classes[:, k].tolist()))
    return sum(gaps) / len(gaps)


def modularity(codes, classes):
    """Ridgeway & Mozer 2018, equation 2: the distance from the template that has the largest entry alone."""
    scores = []
    for row in information(codes, classes):
        theta = max(row)
        template = [theta if k == row.index(theta) else 0 for k in range(len(row))]
        distance = sum((m - t) ** 2 for m, t in zip(row, template, strict=True))
        scores.append(1 - distance / (theta**2 * (len(row) - 1)) if theta else 0)
    return sum(scores) / len(scores)


def area(scores, positive):
    """How often a positive is scored above a negative, ties half."""
    wins = [
        (a > b) + 0.5 * (a == b)
        for (a, p), (b, q) in product(zip(scores, positive, strict=True), repeat=2)
        if p and not q
    ]
    return sum(wins) / len(wins)


def irs(codes, classes):
    """Suter et al. 2019 with the quantile 0.99."""
    robust, weights = [], []
    for z in codes.T:
        largest = max(abs(number - z.mean()) for number in z)
        if largest == 0:
            continue
        of_factors = []
        for y in classes.T:
            groups = [z[y == value] for value in sorted(set(y.tolist()))]
            spreads = [np.quantile(np.abs(group - group.mean()), 0.99) for group in groups if len(group) > 1]
            of_factors.append(1 - sum(spreads) / len(spreads) / largest)
        robust.append(max(of_factors))
        weights.append(largest)
    return sum(w * r for w, r in zip(weights, robust, strict=True)) / sum(weights)


def concentration(rows):
    """DCI: 1 - entropy of each row's shares to the base of their number, weighted by its share of everything."""
    total, score = sum(map(sum, rows)), 0.0
    for row in rows:
        shares = [entry / sum(row) for entry in row if entry]
        score += sum(row) / total * (1 + sum(p * math.log(p, len(row)) for p in shares))
    return score


def share_of_largest(rows):
    """InfoM of rows that are latents, InfoC of rows that are factors."""
    mean, chance = sum(max(row) / sum(row) for row in rows) / len(rows), 1 / len(rows[0])
    return (mean - chance) / (1 - chance)


def relative_strength(similarity):
    """Of UDR: r^2 / sum, the mean over rows and that over columns."""
    sides = [[max(row) ** 2 / sum(row) for row in side] for side in (similarity, similarity.T)]
    return sum(sum(side) / len(side) for side in sides) / 2
