"""The convolutions of the networks here: kernel 4, stride 2, padding 1.

On a GPU those next to the image are kernels of our own: cuDNN has for so few channels only slow ones that repeat
bit for bit. So are those of replicas where tensor cores multiply. To autograd, vmap and torch.compile each is one
operation, of replicas one for all.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaedist.layers import channels_last
from vaedist.trust import trusted

FEW = 4  # channels of an image, at most
Dtype = torch.dtype


class Down(nn.Conv2d):
    """Halves the side: [rows, inputs, size, size] -> [rows, outputs, size / 2, size / 2]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return _apply(torch.ops.vaedist.down, x, self) if _on_gpu(x, self) else super().forward(x)


class Up(nn.ConvTranspose2d):
    """Doubles the side: [rows, inputs, size, size] -> [rows, outputs, 2 size, 2 size]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 4, stride=2, padding=1)

    def forward(self, y: Tensor) -> Tensor:  # type: ignore[override]
        return _apply(torch.ops.vaedist.up, y, self) if _on_gpu(y, self) else super().forward(y)


def _on_gpu(x: Tensor, layer: nn.Module) -> bool:
    """But in float64, which is for proofs, and under ZeRO-3, which takes weights away that these would keep."""
    return x.is_cuda and x.dtype != torch.float64 and not hasattr(layer.weight, "ds_id")


def _apply(op: Any, x: Tensor, layer: Any) -> Tensor:
    """In the precision of autocast, where that is on."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    found: Tensor = op(x[None], layer.weight[None], dtype)[0]
    return found + layer.bias.to(dtype)[:, None, None]  # cuDNN adds it by a kernel, too; torch.compile by the ReLU's


# In the operations x is [R, N, C, S, S], y [R, N, O, S/2, S/2] and w [R, O, C, 4, 4], of R replicas. All have their
# channels last in memory.


def _down(x: Tensor, w: Tensor, dtype: Dtype) -> Tensor:
    own = _own(x, w.shape[1], w.shape[2], dtype)
    return _kernels().down(x, w, dtype, _tf32()) if own else _plain_down(x, w, dtype)


def _up(y: Tensor, w: Tensor, dtype: Dtype) -> Tensor:
    own = _own(y, w.shape[1], w.shape[2], dtype)
    return _kernels().up(y, w, dtype, _tf32()) if own else _plain_up(y, w, dtype)


def _slope(x: Tensor, y: Tensor, dtype: Dtype) -> Tensor:
    """The gradient of w: both operations', with either's gradient in the place of its result."""
    own = _own(x, y.shape[2], x.shape[2], dtype)
    found = _kernels().weight(x, y, dtype, _tf32()) if own else _plain_slope(x, y, dtype)
    return channels_last(found.to(dtype))


def _plain_down(x: Tensor, w: Tensor, dtype: Dtype) -> Tensor:
    """By torch, the replicas as groups."""
    images, weight = _grouped(x, dtype), w.to(dtype).flatten(0, 1)
    return _apart(F.conv2d(images, weight, stride=2, padding=1, groups=len(x)), len(x))


def _plain_up(y: Tensor, w: Tensor, dtype: Dtype) -> Tensor:
    images, weight = _grouped(y, dtype), w.to(dtype).flatten(0, 1)
    return _apart(F.conv_transpose2d(images, weight, stride=2, padding=1, groups=len(y)), len(y))


def _plain_slope(x: Tensor, y: Tensor, dtype: Dtype) -> Tensor:
    replicas, outputs, channels = len(x), y.shape[2], x.shape[2]
    like, how = x.new_empty(replicas * outputs, channels, 4, 4, dtype=dtype), ([2, 2], [1, 1], [1, 1], False, [0, 0])
    slopes, images = _grouped(y, dtype), _grouped(x, dtype)
    found = torch.ops.aten.convolution_backward(slopes, images, like, None, *how, replicas, [False, True, False])
    return found[1].unflatten(0, (replicas, outputs))


def _grouped(images: Tensor, dtype: Dtype) -> Tensor:
    return images[0].to(dtype) if len(images) == 1 else images.to(dtype).transpose(0, 1).flatten(1, 2)


def _apart(images: Tensor, replicas: int) -> Tensor:
    return channels_last(images.unflatten(1, (replicas, -1)).transpose(0, 1))


def _own(x: Tensor, outputs: int, channels: int, dtype: Dtype) -> bool:
    """Whether our kernels are the faster ones, and right.

    cuDNN takes replicas as groups, for which it leaves tensor cores idle.
    """
    cores = _tf32() or dtype != torch.float32
    if channels > FEW and not (cores and len(x) > 1):
        return False
    kind = (outputs, channels, x.dtype, dtype, _tf32(), x.device)
    return trusted(kind, lambda: _trial(*kind))


def _trial(outputs: int, channels: int, given: Dtype, dtype: Dtype, tf32: bool, device: torch.device) -> str:
    """What is wrong with them, on random numbers that lie in memory as those of a run do."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    x, y = (channels_last(draw(2, 16, *shape)).to(given) for shape in ((channels, 16, 16), (outputs, 8, 8)))
    w = channels_last(draw(2, outputs, channels, 4, 4))
    ours = {
        "down": _kernels().down(x, w, dtype, tf32),
        "up": _kernels().up(y, w, dtype, tf32),
        "weight": _kernels().weight(x, y, dtype, tf32),
    }
    (x, y, w), exact = (tensor.double() for tensor in (x, y, w)), torch.float64
    theirs = _plain_down(x, w, exact), _plain_up(y, w, exact), _plain_slope(x, y, exact)
    limit = 1e-5 if dtype == torch.float32 and not tf32 else 2e-2
    for (name, found), expected in zip(ours.items(), theirs, strict=True):
        error = float((found - expected).norm() / expected.norm())
        if not error < limit:
            return f"`{name}` of {channels} and {outputs} channels is off by {error:.1e} in {dtype}"
    return ""


def _tf32() -> bool:
    return torch.backends.cudnn.allow_tf32


def _kernels() -> Any:
    from vaedist import kernels  # where there is a GPU there is triton, whose import takes a second

    return kernels


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dtype = inputs
    ctx.save_for_backward(*tensors)


def _down_back(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    (x, w), dtype, back = ctx.saved_tensors, ctx.dtype, None
    if ctx.needs_input_grad[0]:
        back = torch.ops.vaedist.up(slope, w, dtype).to(x.dtype)
    return back, torch.ops.vaedist.slope(x, slope, dtype).to(w.dtype), None


def _up_back(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    (y, w), dtype = ctx.saved_tensors, ctx.dtype
    back = torch.ops.vaedist.down(slope, w, dtype).to(y.dtype)
    return back, torch.ops.vaedist.slope(slope, y, dtype).to(w.dtype), None


def _fake_down(x: Tensor, w: Tensor, dtype: Dtype) -> Tensor:
    half = x.shape[3] // 2
    return x.new_empty(*x.shape[:2], half, half, w.shape[1], dtype=dtype).movedim(-1, -3)


def _fake_up(y: Tensor, w: Tensor, dtype: Dtype) -> Tensor:
    size = y.shape[3] * 2
    return y.new_empty(*y.shape[:2], size, size, w.shape[2], dtype=dtype).movedim(-1, -3)


def _fake_slope(x: Tensor, y: Tensor, dtype: Dtype) -> Tensor:
    return x.new_empty(len(x), y.shape[2], 4, 4, x.shape[2], dtype=dtype).movedim(-1, -3)


def _over_replicas(name: str) -> Any:
    """The rule of vmap: what it maps over are replicas."""

    def rule(info: Any, dimensions: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        *tensors, dtype = inputs
        rows = [
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, dimensions, strict=False)
        ]
        found = getattr(torch.ops.vaedist, name)(*[row.flatten(0, 1) for row in rows], dtype)
        return found.unflatten(0, (info.batch_size, -1)), 0

    return rule


for _name, _arguments, _work, _fake in (
    ("down", "Tensor x, Tensor w", _down, _fake_down),
    ("up", "Tensor y, Tensor w", _up, _fake_up),
    ("slope", "Tensor x, Tensor y", _slope, _fake_slope),
):
    torch.library.define(f"vaedist::{_name}", f"({_arguments}, ScalarType dtype) -> Tensor")
    torch.library.impl(f"vaedist::{_name}", "CompositeExplicitAutograd", _work)
    torch.library.register_fake(f"vaedist::{_name}", _fake)
    torch.library.register_vmap(f"vaedist::{_name}", _over_replicas(_name))
torch.library.register_autograd("vaedist::down", _down_back, setup_context=_keep)
torch.library.register_autograd("vaedist::up", _up_back, setup_context=_keep)
