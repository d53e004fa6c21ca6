"""What the estimates and the evaluators ask of q(z | x), whatever distribution it is."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor


class Posterior(Protocol):
    """q(z | x) of some rows and a draw z of each: a NamedTuple of tensors [rows, latent], made anew from other rows.

    Latents are independent given x, and under the prior p(z); densities are in nats.
    """

    def __init__(self, *fields: Tensor) -> None: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    @property
    def z(self) -> Tensor: ...

    @property
    def mean(self) -> Tensor: ...

    @property
    def std(self) -> Tensor: ...

    def kl(self) -> Tensor:
        """KL(q(z_d | x) || p(z_d)), [rows, latent]."""

    def log_prior(self) -> Tensor:
        """log p(z_d) at the draw, [rows, latent]."""

    def log_density(self, z: Tensor) -> Tensor:
        """log q(z_d | x) of each z under each row's posterior: [n, latent] -> [n, rows, latent]."""
