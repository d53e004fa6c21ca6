"""What the disentanglement metrics share: the codes of the held-out images beside the factors that made the images.

The defaults are those of disentanglement_lib (Locatello et al. 2019), and every draw is made by a generator of its own
with a constant seed: the same draws in every run and on any number of ranks. There the images are drawn anew from all
combinations of the factors; here they are a finite set, the `evaluate.images` first held-out ones: `sample` and `split`
draw without replacement, as many as there are, so that no image is fitted to and scored.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from shards.manifest import Manifest
from vaedist.config import ConfigError
from vaedist.evaluators import Config, Subject
from vaedist.world import World

BINS = 20  # equally wide, of what is continuous
TRAIN, TEST = 10_000, 5_000  # images, points or votes


@dataclass(frozen=True)
class Factor:
    """The images by the class of one factor."""

    classes: np.ndarray  # int64 [n]

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.bincount(self.classes)

    @cached_property
    def order(self) -> np.ndarray:
        return np.argsort(self.classes, kind="stable")

    @cached_property
    def place(self) -> np.ndarray:
        """Of each image among those of its class."""
        place = np.empty_like(self.order)
        place[self.order] = np.arange(len(self.order)) - self.starts[self.classes[self.order]]
        return place

    @cached_property
    def starts(self) -> np.ndarray:
        return self.sizes.cumsum() - self.sizes

    def shared(self, rng: np.random.Generator, shape: Any) -> np.ndarray:
        """Images drawn uniformly among those that are not alone in their class."""
        return rng.choice(np.flatnonzero(self.sizes[self.classes] > 1), shape)

    def alike(self, images: np.ndarray, rng: np.random.Generator, count: int) -> np.ndarray:
        """For each image `count` draws, with replacement, of images of its class: [m] -> [m, count]."""
        chosen = self.classes[images][:, None]
        return self.order[self.starts[chosen] + rng.integers(self.sizes[chosen], size=(len(images), count))]

    def other(self, images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """For each image another one of its class, never itself; the shape stays."""
        chosen = self.classes[images]
        steps = 1 + rng.integers(self.sizes[chosen] - 1)
        return self.order[self.starts[chosen] + (self.place[images] + steps) % self.sizes[chosen]]


@dataclass(frozen=True)
class GroundTruth:
    """A row an image; of the factors, those in which the images differ."""

    codes: np.ndarray  # float64 [n, latent]: the means of q(z | x)
    values: np.ndarray  # float64 [n, factors]
    classes: np.ndarray  # int64 [n, factors]: which value, or of a continuous factor which of its bins
    continuous: np.ndarray  # bool [factors]

    def rows(self, chosen: np.ndarray) -> "GroundTruth":
        return replace(self, codes=self.codes[chosen], values=self.values[chosen], classes=self.classes[chosen])

    def factors(self, chosen: list[int]) -> "GroundTruth":
        """Raises ConfigError where they are fewer than two: there is nothing to tell apart."""
        if len(chosen) < 2 or self.codes.shape[1] < 2:
            raise ConfigError(
                f"evaluate.names: a disentanglement metric needs two latents and two factors that vary; there are "
                f"{self.codes.shape[1]} and {len(chosen)} in the {len(self.codes)} held-out images that are looked at"
            )
        return replace(
            self,
            values=self.values[:, chosen],
            classes=self.classes[:, chosen],
            continuous=self.continuous[chosen],
        )

    def sample(self, count: int = TRAIN) -> "GroundTruth":
        """So many of the images, or all, without replacement."""
        if count >= len(self.codes):
            return self
        part = self.rows(generator().choice(len(self.codes), count, replace=False))
        return part.factors([k for k, column in enumerate(part.classes.T) if len(np.unique(column)) > 1])

    def split(self, train: int = TRAIN, test: int = TEST) -> tuple["GroundTruth", "GroundTruth"]:
        """Disjoint images to fit and to score; where there are fewer in all, two thirds and one third of them.

        A factor needs two classes that are in both.
        """
        order = generator().permutation(len(self.codes))
        train = min(train, len(order) * train // (train + test))
        parts = self.rows(order[:train]), self.rows(order[train : train + test])
        columns = zip(*(part.classes.T for part in parts), strict=True)
        chosen = [k for k, (first, second) in enumerate(columns) if len(np.intersect1d(first, second)) > 1]
        return parts[0].factors(chosen), parts[1].factors(chosen)


def require(config: Config, manifest: Manifest, latents: int) -> None:
    """Raises ConfigError where too little is known of what made the images, or there is nothing to compare."""
    if not manifest.factors and not manifest.attributes:
        raise ConfigError(
            f"evaluate.names: a disentanglement metric needs the factors or attributes of the images, and "
            f"{manifest.directory} has neither: leave it out"
        )
    _without_codes(config, manifest, latents)


def require_split(config: Config, manifest: Manifest, latents: int) -> None:
    """The same where some images are fitted to and others scored."""
    require(config, manifest, latents)
    _without_codes(config, manifest, latents).split()


def _without_codes(config: Config, manifest: Manifest, latents: int) -> GroundTruth:
    values, continuous = made_of(manifest, config.images)
    return known(np.zeros((len(values), latents)), values, continuous)


def ground_truth(subject: Subject) -> GroundTruth:
    """Of the held-out images that are looked at."""
    values, continuous = made_of(subject.data.manifest, subject.count)
    return known(subject.codes().mean.double().cpu().numpy(), values, continuous)


def made_of(manifest: Manifest, images: int | None) -> tuple[np.ndarray, list[bool]]:
    """The factors of the first held-out images, else their attributes, [n, factors], and which are continuous."""
    if manifest.factors:
        name, continuous = "factors", [not factor.values for factor in manifest.factors]
    else:
        name, continuous = "labels", [False] * len(manifest.attributes)
    return manifest.array("valid" if "valid" in manifest.splits else "train", name)[:images], continuous


def known(codes: np.ndarray, values: np.ndarray, continuous: list[bool]) -> GroundTruth:
    """Codes [n, latent] and factors [n, factors]; one that no images share, or all, is left out."""
    values = values.astype(np.float64)
    binned = np.where(continuous, discretise(values), values)
    classes = np.stack([np.unique(column, return_inverse=True)[1] for column in binned.T], axis=1)
    truth = GroundTruth(codes, values, classes, np.array(continuous))
    return truth.factors([k for k, last in enumerate(classes.max(axis=0)) if 0 < last < len(classes) - 1])


def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def discretise(columns: np.ndarray) -> np.ndarray:
    """The bin of each number between the least and the largest of its column: int64 [n, columns]."""
    edges = np.linspace(columns.min(axis=0), columns.max(axis=0), BINS + 1)[1:-1]
    return np.stack([np.digitize(*pair) for pair in zip(columns.T, edges.T, strict=True)], axis=1)


def mutual_information(bins: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Of the observed frequencies, in nats: int [n, latent] and int [n, factors] -> [latent, factors]."""
    count, latent = bins.shape
    width = bins.max() + 1
    found = np.empty((latent, classes.shape[1]))
    for k, column in enumerate(classes.T):
        values = column.max() + 1
        cells = (bins + width * np.arange(latent)) * values + column[:, None]
        joint = np.bincount(cells.ravel(), minlength=latent * width * values).reshape(latent, width, values)
        independent = joint.sum(axis=2, keepdims=True) * joint.sum(axis=1, keepdims=True)
        # integers: a code that is constant has exactly none
        ratio = np.divide(joint * count, independent, out=np.ones(joint.shape), where=joint > 0)
        found[:, k] = (joint * np.log(ratio)).sum(axis=(1, 2)) / count
    return found.clip(min=0)


def entropy(classes: np.ndarray) -> np.ndarray:
    """Of the observed frequencies, in nats: [n, factors] -> [factors]."""
    return np.array([mutual_information(column[:, None], column[:, None]).item() for column in classes.T])


def each_factor(world: World, count: int, fit: Callable[[int], Any]) -> list[Any]:
    """`fit` of every factor, small and picklable: each rank does some of them, and all get all.

    On one thread, whose sums are the same whatever the number of processes.
    """
    with threadpool_limits(limits=1):
        everyone = world.everyone({k: fit(k) for k in range(world.rank, count, world.size)})
    found = {k: result for results in everyone for k, result in results.items()}
    return [found[k] for k in range(count)]
