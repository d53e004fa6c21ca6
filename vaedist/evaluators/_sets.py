"""The sets of images that are compared, pixels in [0, 1]: held-out ones, their reconstructions, and samples."""

from collections.abc import Callable

import numpy as np
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
    return _decoded(subject, subject.codes().mean[ids], ids)


def samples(subject: Subject, ids: Ids) -> Tensor:
    """What it expects at draws from the prior, the same latents at every evaluation."""
    return _decoded(subject, subject.objective.prior(subject.noise(ids), subject.backend.dtype), ids)


def together(
    subject: Subject, count: int, of: Callable[[Ids], tuple[Tensor, ...]], at_once: int = ENCODED
) -> tuple[Tensor, ...]:
    """What `of` gives for the ids 0..count-1, a row each, computed by all ranks together, without autocast.

    Every rank has all rows, the same bits on any number of ranks: `of` sees `at_once` ids at a time on any.
    """
    chunks = [np.arange(start, min(start + at_once, count)) for start in range(0, count, at_once)]
    mine = chunks[subject.world.rank :: subject.world.size]
    whole: tuple[Tensor, ...] = ()
    with torch.autocast(subject.backend.device.type, enabled=False):
        for ids in mine or chunks[:1]:
            some = of(ids)
            whole = whole or tuple(rows.new_zeros(count, *rows.shape[1:]) for rows in some)
            for rows, found in zip(whole, some, strict=True):
                rows[ids] = found if mine else torch.zeros_like(found)
    return tuple(map(subject.world.sum, whole))


def _decoded(subject: Subject, z: Tensor, ids: Ids) -> Tensor:
    objective = subject.objective
    with subject.backend.autocast():
        return _unit(subject, objective.likelihood.mean(objective.vae.decode(z, subject.noise(ids))))


def _unit(subject: Subject, images: Tensor) -> Tensor:
    low, high = subject.objective.vae.pixel_range
    return ((images - low) / (high - low)).clamp(0, 1)
