"""How gradients cross the ranks: those of all players in one tensor, by one sum a step."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vaedist.world import World


class Gradients:
    """Puts the mean over ranks in the place of every gradient, once a step.

    torch's DistributedDataParallel sums parts while the backward pass goes on, and in one more sum tells which weights
    were used. After its first step it cuts the parts anew: numbers change their places in the ring of ranks, and so the
    order of their sums, and a resumed run would have other bits. Here a number's place stays.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World) -> None:
        """Every rank calls it; all go on with the weights of rank 0."""
        self._parameters, self._world = list(parameters), world
        self._whole: Tensor | None = None  # kept: a CPU would have to map its pages anew in every step
        for parameter in self._parameters:
            world.follow_first(parameter.data)

    def average(self) -> None:
        """Every rank calls it, with gradients of the same weights."""
        if self._world.size == 1:
            return
        moved = [parameter for parameter in self._parameters if parameter.grad is not None]
        # as they lie in memory, where a gradient lies as its weight does
        gradients = [
            parameter.grad.as_strided((parameter.numel(),), (1,)) for parameter in moved if parameter.grad is not None
        ]
        if self._whole is None:
            self._whole = torch.cat(gradients)
        else:
            torch.cat(gradients, out=self._whole)
        self._world.average(self._whole)
        for parameter, mean in zip(moved, self._whole.split([len(part) for part in gradients]), strict=True):
            parameter.grad = mean.as_strided(parameter.shape, parameter.stride())
