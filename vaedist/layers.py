"""Layers whose result does not depend on how the batch is spread over processes."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vaedist.noise import Noise
from vaedist.world import World


def channels_last(x: Tensor) -> Tensor:
    """Images [..., C, H, W] whose channels come last in memory; as torch.channels_last, which vmap does not know."""
    return x.movedim(-3, -1).contiguous().movedim(-1, -3)


class Sequential(nn.Sequential):
    """nn.Sequential that hands the rows' noise to the layers that draw some, and lays out images channels last.

    That layout is the one in which convolutions are fast, on a CPU as in the tensor cores of a GPU.
    """

    def forward(self, x: Tensor, noise: Noise) -> Tensor:  # type: ignore[override]
        for layer in self:
            if x.ndim == 4:
                x = channels_last(x)
            x = layer(x, noise) if isinstance(layer, Dropout) else layer(x)
        return x


def frozen(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), whose gradient flows through the module, not into it."""
    parameters = dict(module.named_parameters())
    if not any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        return functional_call(module, {name: parameter.detach() for name, parameter in parameters.items()}, (x,))
    module.requires_grad_(False)  # ZeRO-3 brings a module's own weights together, and no others
    try:
        return module(x)
    finally:
        module.requires_grad_(True)


def widen(x: Tensor) -> Tensor:
    """float32 or wider: posteriors and losses are never computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class WideLinear(nn.Linear):
    """A linear layer that autocast leaves in float32: half precision would round what it says about a posterior."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(widen(x))


class Dropout(nn.Module):
    """Dropout whose mask is keyed by the sample and by `name`, which must be unique within a network."""

    def __init__(self, probability: float, name: str) -> None:
        super().__init__()
        self.probability, self.name = probability, name

    def forward(self, x: Tensor, noise: Noise) -> Tensor:
        if not self.training:
            return x
        dropped = noise.chance(f"dropout/{self.name}", x[0].numel(), self.probability)
        return x.masked_fill(dropped.view_as(x), 0) / (1 - self.probability)

    def extra_repr(self) -> str:
        return f"{self.probability}, {self.name!r}"


class BatchNorm2d(nn.Module):
    """Batch normalisation with the statistics of the rows of all ranks (Ioffe & Szegedy 2015, Algorithm 1).

    torch's SyncBatchNorm refuses CPUs. Statistics are float32 or wider whatever the activations are. Under
    accumulation they are those of one micro-batch. Only passes with gradient move the running averages.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, world: World, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.world, self.eps, self.momentum = world, eps, momentum
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.running_mean.dtype)
        mean, var = self._batch_statistics(wide) if self.training else (self.running_mean, self.running_var)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return ((wide - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.world.mean(x.mean((0, 2, 3)))
        var = self.world.mean((x - mean[:, None, None]).square().mean((0, 2, 3)))
        if torch.is_grad_enabled():
            count = self.world.size * x.numel() // x.shape[1]
            with torch.no_grad():
                self.running_mean.copy_(self.running_mean.lerp(mean, self.momentum))
                self.running_var.copy_(self.running_var.lerp(var * count / (count - 1), self.momentum))
        return mean, var
