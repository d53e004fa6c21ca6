"""The sets of images that are compared, pixels in [0, 1]: held-out ones, their reconstructions, and samples."""

from collections.abc import Callable

import torch
from torch import Tensor

from vaedist.data.order import Ids
from vaedist.evaluators import ENCODED, Subject

Images = Callable[[Subject, Ids], Tensor]  # [n, C, H, W] in [0, 1]


def held_out(subject: Subject, ids: Ids) -> Tensor:
    """The held-out images themselves."""
    return _unit(subject, subject.images(ids)[0])


def reconstructions(subject: Subject, ids: Ids) -> Tensor:
    """What the decoder expects at the posterior mean of each."""
    return _decoded(subject, subject.codes().mean[ids])


def samples(subject: Subject, ids: Ids) -> Tensor:
    """What it expects at draws from the prior, the same latents at every evaluation."""
    return _decoded(subject, subject.objective.prior(subject.noise(ids), subject.backend.dtype))


def together(
    subject: Subject, count: int, of: Callable[[Ids], tuple[Tensor, ...]], at_once: int = ENCODED
) -> list[Tensor]:
    """`Subject.rows` without autocast."""
    with torch.autocast(subject.backend.device.type, enabled=False):
        return subject.rows(count, of, at_once)


def _decoded(subject: Subject, z: Tensor) -> Tensor:
    with subject.backend.autocast():
        return _unit(subject, subject.expected(z))


def _unit(subject: Subject, images: Tensor) -> Tensor:
    low, high = subject.objective.vae.pixel_range
    return ((images - low) / (high - low)).clamp(0, 1)
