"""What is a better number: the direction of each metric, its final and its best value, and runs with other seeds."""

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from vaedist.compare.runs import Curve, Point
from vaedist.config import ConfigError
from vaedist.words import nearest

# A word of a metric's name that says which way is better; a name with none of them, or with some of both, has no best.
HIGHER = {"elbo", "psnr", "ssim", "mig", "sap", "modularity", "disentanglement", "completeness", "informativeness"}
HIGHER |= {"explicitness", "metric", "accuracy", "precision", "recall", "density", "coverage", "irs"}
HIGHER |= {"infom", "infoc", "infoe"}
LOWER = {"recon", "nll", "bpd", "mse", "mae", "error", "lpips", "fid", "kid", "swd"}
SHOWN = ("eval/*", "latent/mi", "latent/tc", "latent/dwkl", "latent/active_units")


def direction(metric: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither is known."""
    name = set(re.split(r"[^a-z0-9]+", metric.partition("/")[2].lower()))
    return bool(name & HIGHER) - bool(name & LOWER)


def best(curve: Curve, sign: int) -> Point:
    """The first of the best."""
    return max(curve, key=lambda point: sign * point.value)


def chosen(words: Iterable[str], known: Sequence[str]) -> list[str]:
    """The metrics that names and patterns such as eval/* mean. Raises ConfigError for one that no run has."""
    found: dict[str, None] = {}
    for word in words:
        matches = [name for name in known if fnmatchcase(name, word)]
        if not matches:
            raise ConfigError(f"--metrics: no run has {word}; {nearest(word, known)}")
        found |= dict.fromkeys(matches)
    return list(found)


def usual(known: Sequence[str]) -> list[str]:
    return [name for pattern in SHOWN for name in known if fnmatchcase(name, pattern)]


@dataclass(frozen=True)
class Spread:
    """The same number of several runs."""

    mean: float
    std: float | None  # of the sample; None of one run
    n: int
    steps: tuple[int, ...]  # where it was measured, each once

    @classmethod
    def of(cls, points: Sequence[Point]) -> "Spread":
        values = [point.value for point in points]
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, len(values), tuple(sorted({point.step for point in points})))

    def __str__(self) -> str:
        """Two digits of the deviation and the mean as far as it is known."""
        if self.std is None or not self.std:
            return f"{self.mean:.6g}{'' if self.std is None else ' ± 0'}"
        digits = max(0, 1 - math.floor(math.log10(self.std)))
        return f"{self.mean:.{digits}f} ± {self.std:.{digits}f}"
