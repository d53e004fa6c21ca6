"""Attributes as directions in the latent space: the mean code with one minus the mean code without it."""

import numpy as np
from torch import Tensor

from shards.manifest import Manifest
from vaedist.config import ConfigError
from vaedist.words import nearest

ALPHAS = (-3, -2, -1, 0, 1, 2, 3)  # how many directions are added to a code


def labels(manifest: Manifest) -> np.ndarray:
    """Which training image has which attribute, bool [images, attributes]; no columns where the set has no labels."""
    if not manifest.attributes:
        return np.zeros((manifest.split("train").count, 0), dtype=bool)
    return np.asarray(manifest.array("train", "labels"), dtype=bool)


def column(manifest: Manifest, name: str) -> int:
    """The column of an attribute. ConfigError unless some training images have it and some do not."""
    if not manifest.attributes:
        raise ConfigError(f"{manifest.directory}: the set has no attributes")
    if name not in manifest.attributes:
        raise ConfigError(f"no attribute {name!r}; {nearest(name, manifest.attributes)}")
    number = manifest.attributes.index(name)
    having, count = labels(manifest)[:, number].sum(), manifest.split("train").count
    if having in (0, count):
        raise ConfigError(f"{name}: {'all' if having else 'none'} of the {count} training images have it: no direction")
    return number


def commonest(manifest: Manifest, count: int) -> tuple[str, ...]:
    """The attributes that are the nearest to half of the training images', whose directions are known best."""
    share = labels(manifest).mean(0)
    order = np.argsort(np.abs(share - 0.5), kind="stable")
    return tuple(manifest.attributes[number] for number in order if 0 < share[number] < 1)[:count]


def direction(manifest: Manifest, means: Tensor, name: str) -> Tensor:
    """The mean of the posterior means, [training images, latent], with an attribute minus that without it: [latent]."""
    having = means.new_tensor(labels(manifest)[:, column(manifest, name)]).bool()
    wide = means.double()
    return (wide[having].mean(0) - wide[~having].mean(0)).to(means)


def edited(means: Tensor, direction: Tensor, alphas: Tensor) -> Tensor:
    """z + alpha * direction of each code under each alpha: [n, latent], [latent], [alphas] -> [n, alphas, latent]."""
    return means[:, None] + alphas.to(means)[:, None] * direction
