"""Likelihoods of the pixels given what the decoder says: negative log densities in nats per image."""

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Family = Literal["bernoulli", "gaussian", "laplace"]


@dataclass(frozen=True)
class Likelihood:
    """`bernoulli` reads the decoder as logits, `gaussian` and `laplace` as the mean, with one scale for all pixels.

    The gaussian's sum of squares is weighted by 1 / (2 scale^2); scale = sqrt(1/2) gives the plain sum of squares.
    """

    family: Family
    scale: float

    def nll(self, decoded: Tensor, images: Tensor) -> Tensor:
        """-log p(images | decoded), summed over the pixels: [batch, C, H, W] twice -> [batch]."""
        if self.family == "bernoulli":
            terms = F.binary_cross_entropy_with_logits(decoded, images, reduction="none")
        elif self.family == "gaussian":
            terms = 0.5 * ((images - decoded) / self.scale).square() + log(self.scale * math.sqrt(2 * math.pi))
        else:
            terms = (images - decoded).abs() / self.scale + log(2 * self.scale)
        return terms.sum((1, 2, 3))

    def mean(self, decoded: Tensor) -> Tensor:
        """The expected image, in the units of the pixels."""
        return decoded.sigmoid() if self.family == "bernoulli" else decoded


def log(scale: float | Tensor) -> float | Tensor:
    """Of a number, or of the tensor that replicas with scales of their own make of it."""
    return scale.log() if isinstance(scale, Tensor) else math.log(scale)
