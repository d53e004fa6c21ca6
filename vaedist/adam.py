"""Adam's step on a GPU: torch's, by a kernel of our own.

torch's fused one has a block of threads for 65,536 numbers, and leaves most of a GPU idle where there are as few
weights as here. Everything else of the optimiser is torch's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vaedist.trust import alike, trusted

fused = torch.ops.aten._fused_adamw_.default


def trusted_on(device: torch.device) -> bool:
    """Whether the kernel is right there, a GPU."""
    return trusted(("adam", device), lambda: _trial(device))


class Own(TorchDispatchMode):
    """Around a step of torch.optim.AdamW, of float32."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operation is not fused:
            return operation(*args, **kwargs)
        *rows, _, counts = args
        return at_once([*rows, counts], **kwargs) if alike(*rows) else fused(*args, **kwargs)


def at_once(
    rows: Sequence[Sequence[Tensor]], *, lr: float, beta1: float, beta2: float, weight_decay: float, eps: float,
    grad_scale: Tensor | None = None, found_inf: Tensor | None = None, **_: Any,
) -> None:  # fmt: skip
    """As torch._fused_adamw_, without its variants; but that gradients stay scaled.

    rows: weights, gradients, both moments, float32 and each in memory as its weight, and the counts of steps.
    """
    from vaedist import kernels  # see `convolution`

    kernels.adam(rows, grad_scale, found_inf, lr, beta1, beta2, weight_decay, eps)


def _trial(device: torch.device) -> str:
    """What is wrong with it, on random numbers, against torch's in float64."""
    generator = torch.Generator().manual_seed(0)
    sizes, counts = (5, 3000, 70_000), (1.0, 7.0, 30_000.0)
    weights, slopes, means = ([torch.randn(size, generator=generator) for size in sizes] for _ in range(3))
    given = weights, slopes, means, [mean.square() for mean in means]
    ours, theirs = (
        [[one.to(device, dtype) for one in row] for row in given] for dtype in (torch.float32, torch.float64)
    )
    steps = [torch.full((), count, device=device) for count in counts]
    numbers: dict[str, Any] = {"lr": 1e-3, "beta1": 0.5, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}
    at_once([*ours, steps], **numbers)
    fused(*theirs, [], steps, **numbers, amsgrad=False, maximize=False)
    pairs = [pair for row in zip(ours, theirs, strict=True) for pair in zip(*row, strict=True)]
    wrong = [error for one, other in pairs if not (error := float((one - other).norm() / other.norm())) < 1e-6]
    return f"Adam is off by {wrong[0]:.1e}" if wrong else ""
