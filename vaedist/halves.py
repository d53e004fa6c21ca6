"""The weights of a pass in half precision, all by one kernel, where autocast would round each by one of its own."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vaedist.branch import hold
from vaedist.layers import WideLinear
from vaedist.trust import alike, trusted

ROUNDED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)  # by autocast


class _Halves(torch.autograd.Function):
    """Weights [...] in `dtype`, and their gradients back in float32; a few launches for all of them on a GPU."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        halves = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        _copy(halves, list(weights))
        return tuple(halves)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [slope for slope in slopes if slope is not None]
        wide = [torch.empty_like(slope, dtype=torch.float32) for slope in there]
        _copy(wide, there)
        found = iter(wide)
        return None, *(None if slope is None else next(found) for slope in slopes)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Each source into its target, rounded. torch's has a block of threads for 65,536 numbers, as its Adam has."""
    device = targets[0].device
    if device.type == "cuda" and alike(targets, sources) and trusted(("halves", device), lambda: _trial(device)):
        from vaedist import kernels  # see `convolution`

        kernels.copy(targets, sources)
    else:
        torch._foreach_copy_(targets, sources)


def _trial(device: torch.device) -> str:
    """What is wrong with our kernel there: it must give torch's bits, there and back."""
    from vaedist import kernels

    generator = torch.Generator().manual_seed(0)
    sizes = (5, 3000, 70_000)
    powers = [10.0 ** torch.randint(-9, 6, (size,), generator=generator) for size in sizes]  # beyond float16 too
    given = [(torch.randn(len(power), generator=generator) * power).to(device) for power in powers]
    for dtype in (torch.bfloat16, torch.float16):
        halves, back = ([torch.empty_like(one, dtype=kind) for one in given] for kind in (dtype, torch.float32))
        kernels.copy(halves, given)
        kernels.copy(back, halves)
        for one, half, wide in zip(given, halves, back, strict=True):
            if not (torch.equal(half, one.to(dtype)) and torch.equal(wide, half.float())):
                return f"weights are not rounded to {dtype} as torch does"
    return ""


class Autocast(nn.Module):
    """The objective inside of autocast: the same under every engine, which is why the engines do not do it."""

    def __init__(
        self, objective: nn.Module, autocast: Callable[[], AbstractContextManager[Any]], half: torch.dtype | None
    ) -> None:
        """half: of autocast, where its weights are to be rounded at once; the bits are those of autocast alone."""
        super().__init__()
        self.objective, self._autocast, self._half = objective, autocast, half
        self._rounded = {
            f"{path}.{name}": weight
            for path, module in objective.named_modules()
            if half and isinstance(module, ROUNDED) and not isinstance(module, WideLinear)
            for name, weight in module.named_parameters(recurse=False)
        }

    def forward(self, *batch: Any) -> dict[str, Tensor]:
        with self._autocast():
            if not self._rounded:
                return self.objective(*batch)
            halves = _Halves.apply(self._half, *self._rounded.values())
            hold(halves)
            return functional_call(self.objective, dict(zip(self._rounded, halves, strict=True)), batch)
