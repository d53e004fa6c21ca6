"""The rows of a batch spread over the ranks: mathematics written for the whole batch, on any number of processes.

A step takes `batch` rows at the positions seen, seen + 1, ...; they are laid out micro-batch by micro-batch, and within
a micro-batch rank by rank. On one process every method is the identity.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vaedist.noise import Noise

RANKS_A_STEP = 16  # that a vote passes: gloo hands even one byte from rank to rank, twice around all of them

# By this name torch has it since a version between 2.11 and 2.14.
set_timeout = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)

_awaited: list[str] = []  # the collectives that the main thread is in


@contextmanager
def together(what: str) -> Iterator[None]:
    """Around a collective: what a rank waits for when it does not come back; after an error it stays to be named."""
    _awaited.append(what)
    yield
    _awaited.pop()


def none_awaited() -> None:
    """After an error that changes nothing for the others."""
    _awaited.clear()


def awaited() -> str:
    """The collective that this process is in, if it is in one."""
    return _awaited[-1] if _awaited else ""


class _Gather(torch.autograd.Function):
    """Concatenation over ranks, of several tensors at once, which travel as bytes.

    Each rank's loss depends on every row, so a row's gradient is the SUM over ranks, for its own rank alone; the
    mean over ranks of the parameters' gradients then gives the gradient of the mean loss.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        rows = [tensor.contiguous().view(len(tensor), -1).view(torch.uint8) for tensor in tensors]
        own = torch.cat(rows, 1)
        everyone = own.new_empty(dist.get_world_size() * len(own), own.shape[1])
        with together("a gather of rows"):
            dist.all_gather_into_tensor(everyone, own)
        parts = everyone.split([part.shape[1] for part in rows], 1)
        found = [
            part.contiguous().view(tensor.dtype).view(-1, *tensor.shape[1:])
            for part, tensor in zip(parts, tensors, strict=True)
        ]
        fixed = [part for part, tensor in zip(found, tensors, strict=True) if not tensor.requires_grad]
        ctx.mark_non_differentiable(*fixed)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [grad for grad in grads if grad is not None]
        rows = [grad.flatten(1) if grad.ndim > 1 else grad[:, None] for grad in there]
        everyone = torch.cat(rows, 1)
        own = everyone.new_empty(len(everyone) // dist.get_world_size(), everyone.shape[1])
        dist.reduce_scatter_tensor(own, everyone)
        parts = iter(own.split([part.shape[1] for part in rows], 1))
        return tuple(None if grad is None else next(parts).reshape(-1, *grad.shape[1:]) for grad in grads)


class _Sum(torch.autograd.Function):
    """Sum over ranks; the gradient is summed likewise, see `_Gather`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        with together("a sum over the ranks"):
            dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


@dataclass(frozen=True)
class World:
    rank: int = 0
    size: int = 1

    def positions(self, seen: int, batch: int, accumulate: int = 1) -> np.ndarray:
        """Positions of this rank's rows of the step that begins after `seen` images: int64 [accumulate, local]."""
        return (seen + np.arange(batch)).reshape(accumulate, self.size, -1)[:, self.rank]

    def gather(self, rows: Tensor) -> Tensor:
        """Rows of all ranks in rank order, differentiable: [local, ...] -> [size * local, ...]."""
        return self.gather_together(rows)[0]

    def gather_together(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The same of several tensors of as many rows, of any types, at the price of one."""
        return tensors if self.size == 1 else _Gather.apply(*tensors)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over ranks, differentiable; the shape stays."""
        return value if self.size == 1 else _Sum.apply(value)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over ranks, differentiable; the shape stays."""
        return self.sum(value) / self.size

    def average(self, tensor: Tensor) -> None:
        """Puts the mean over ranks in the place of every number, without gradient."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor /= self.size

    def follow_first(self, tensor: Tensor) -> None:
        """Puts the numbers of rank 0 in their place, without gradient."""
        if self.size > 1:
            with together("a copy of the weights of rank 0"):
                dist.broadcast(tensor, 0)

    def permute_dims(self, z: Tensor, noise: Noise) -> Tensor:
        """Permutes every latent dimension on its own over all rows of the step (Kim & Mnih 2018, Algorithm 1).

        z, noise: this rank's rows of the step, [accumulate, local, latent] and [accumulate, local]; without gradient.
        """
        accumulate, local, latent = z.shape
        first = noise.positions[0, 0] - self.rank * local  # the position of the step's first row
        everyone = noise.at(first + torch.arange(accumulate * self.size * local, device=z.device))
        order = everyone.bits("permute_dims", latent).argsort(dim=0, stable=True)
        permuted = self.step_rows(z).gather(0, order)
        return permuted.unflatten(0, (accumulate, self.size, local))[:, self.rank]

    def step_rows(self, rows: Tensor) -> Tensor:
        """[accumulate, local, ...] of each rank -> [batch, ...] in order of position, differentiable."""
        return self.gather(rows[None]).transpose(0, 1).flatten(0, 2)

    def everyone(self, value: Any) -> list[Any]:
        """A small picklable value of each rank, in rank order; every rank must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with together("an exchange of what each rank knows"):
            dist.all_gather_object(values, value)
        return values


class Vote:
    """The largest number that any rank has given, told one round later, so that nobody waits for it.

    A round is one call, of more than `RANKS_A_STEP` ranks several. Its own group on the CPU: no device is synchronised,
    and a rank that is lost is noticed in the next round.
    """

    def __init__(self, world: World) -> None:
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._given = torch.zeros(1, dtype=torch.uint8)
        self._round, self._calls, self._largest = math.ceil(world.size / RANKS_A_STEP), 0, 0
        self._work: Any = None

    def __call__(self, number: int) -> int:
        """The largest number of the round before this one, once; of this call where there is one rank.

        0 <= number < 256.
        """
        if self._group is None:
            return number
        self._calls, self._largest = self._calls + 1, max(self._largest, number)
        if self._calls % self._round:
            return 0
        self._wait()
        largest = int(self._given)
        self._given.fill_(self._largest)
        self._largest = 0
        self._work = dist.all_reduce(self._given, dist.ReduceOp.MAX, self._group, async_op=True)
        return largest

    def limit(self, timeout: timedelta) -> None:
        """How long one rank waits for another, here and in every other collective."""
        if self._group is not None:
            set_timeout(2 * timeout)  # NCCL would abort the process: the vote is to raise before it does
            set_timeout(timeout, self._group)

    def close(self) -> None:
        """Every rank calls it after the same number of votes."""
        self._wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def _wait(self) -> None:
        if self._work is not None:
            with together("the vote on a stop"):
                self._work.wait()
            self._work = None
