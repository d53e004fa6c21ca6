"""The convolutions of the networks here: kernel 4, stride 2, padding 1.

On a GPU those next to the image and those of replicas are kernels of our own. With an image's few channels cuDNN has
only slow ones that repeat bit for bit, and for replicas none that are made for so few channels a group. To autograd,
vmap and torch.compile each is one operation.
"""

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 4  # channels of an image, at most
Dtype = torch.dtype


class Down(nn.Conv2d):
    """Halves the side: [rows, inputs, size, size] -> [rows, outputs, size / 2, size / 2]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return _apply(torch.ops.vaedist.down, x, self) if _on_gpu(x) else super().forward(x)


class Up(nn.ConvTranspose2d):
    """Doubles the side: [rows, inputs, size, size] -> [rows, outputs, 2 size, 2 size]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 4, stride=2, padding=1)

    def forward(self, y: Tensor) -> Tensor:  # type: ignore[override]
        return _apply(torch.ops.vaedist.up, y, self) if _on_gpu(y) else super().forward(y)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda and x.dtype != torch.float64  # for proofs


def _apply(op: Any, x: Tensor, layer: Any) -> Tensor:
    """In the precision of autocast, where that is on."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    found: Tensor = op(x[None], layer.weight[None], layer.bias[None], dtype)[0]
    return found


# In the operations x is [R, N, C, S, S], y [R, N, O, S/2, S/2], w [R, O, C, 4, 4] and b [R, channels], of R replicas.


def _down(x: Tensor, w: Tensor, b: Tensor, dtype: Dtype) -> Tensor:
    if _own(x, w.shape[1], w.shape[2], dtype):
        return _kernels().down(x, w, b, dtype, torch.backends.cudnn.allow_tf32)
    return _each(_plain_down, x.to(dtype), w.to(dtype), b.to(dtype))


def _up(y: Tensor, w: Tensor, b: Tensor, dtype: Dtype) -> Tensor:
    if _own(y, w.shape[1], w.shape[2], dtype):
        return _kernels().up(y, w, b, dtype, torch.backends.cudnn.allow_tf32)
    return _each(_plain_up, y.to(dtype), w.to(dtype), b.to(dtype))


def _slope(x: Tensor, y: Tensor, dtype: Dtype) -> Tensor:
    """The gradient of w, float32: both operations', with either's gradient in the place of its result."""
    if _own(x, y.shape[2], x.shape[2], dtype):
        return _kernels().weight(x, y, dtype, torch.backends.cudnn.allow_tf32)
    return _each(lambda x, y: _plain_slope(x, y).float(), x.to(dtype), y.to(dtype))


def _own(x: Tensor, others: int, channels: int, dtype: Dtype) -> bool:
    """Whether our kernels are the faster ones, and right."""
    faster = len(x) > 1 or channels <= FEW
    return faster and _right(others, channels, dtype, torch.backends.cudnn.allow_tf32, x.device)


@lru_cache
def _right(others: int, channels: int, dtype: Dtype, tf32: bool, device: torch.device) -> bool:
    """Whether they give here what torch gives in float64: not every compiler and GPU has been seen. Asked once."""
    generator, why = torch.Generator().manual_seed(0), ""
    shapes = (2, 4, channels, 16, 16), (2, 4, others, 8, 8), (2, others, channels, 4, 4), (2, others), (2, channels)
    x, y, w, b, c = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    limit = 1e-5 if dtype == torch.float32 and not tf32 else 2e-2
    try:
        down, up = _kernels().down(x, w, b, dtype, tf32), _kernels().up(y, w, c, dtype, tf32)
        ours = {"down": down, "up": up, "weight": _kernels().weight(x, y, dtype, tf32)}
        exact = [_exact(*row) for row in zip(*(tensor.double() for tensor in (x, y, w, b, c)), strict=True)]
        for (name, found), expected in zip(ours.items(), map(torch.stack, zip(*exact, strict=True)), strict=True):
            error = float((found - expected).norm() / expected.norm())
            if not error < limit:
                why = f"`{name}` of {channels} and {others} channels is off by {error:.1e} in {dtype}"
    except Exception as failed:  # of a compiler
        why = str(failed).partition("\n")[0]
    if why:
        print(f"vaedist: convolutions are cuDNN's, which are slower, since ours fail here: {why}", file=sys.stderr)
    return not why


def _exact(x: Tensor, y: Tensor, w: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _plain_down(x, w, b), _plain_up(y, w, c), _plain_slope(x, y)


def _plain_down(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv2d(x, w, b, stride=2, padding=1)


def _plain_up(y: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.conv_transpose2d(y, w, b, stride=2, padding=1)


def _plain_slope(x: Tensor, y: Tensor) -> Tensor:
    like, how = y.new_empty(y.shape[1], x.shape[1], 4, 4), ([2, 2], [1, 1], [1, 1], False, [0, 0], 1)
    slope: Tensor = torch.ops.aten.convolution_backward(y, x, like, None, *how, [False, True, False])[1]
    return slope


def _kernels() -> Any:
    from vaedist import kernels  # where there is a GPU there is triton, whose import takes a second

    return kernels


def _each(work: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """`work` on what each replica has of `rows`; mostly there is one."""
    found = [work(*row) for row in zip(*rows, strict=True)]
    return found[0][None] if len(found) == 1 else torch.stack(found)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.dtype = inputs[3]


def _down_back(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    (x, w), dtype, back = ctx.saved_tensors, ctx.dtype, None
    if ctx.needs_input_grad[0]:
        back = torch.ops.vaedist.up(slope, w, w.new_zeros(len(w), w.shape[2]), dtype).to(x.dtype)
    return back, torch.ops.vaedist.slope(x, slope, dtype).to(w.dtype), _bias(slope, w), None


def _up_back(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
    (y, w), dtype = ctx.saved_tensors, ctx.dtype
    back = torch.ops.vaedist.down(slope, w, w.new_zeros(len(w), w.shape[1]), dtype).to(y.dtype)
    return back, torch.ops.vaedist.slope(slope, y, dtype).to(w.dtype), _bias(slope, w), None


def _bias(slope: Tensor, w: Tensor) -> Tensor:
    return slope.sum((1, 3, 4), dtype=w.dtype)


def _fake_down(x: Tensor, w: Tensor, b: Tensor, dtype: Dtype) -> Tensor:
    half = x.shape[3] // 2
    return x.new_empty(*x.shape[:2], half, half, w.shape[1], dtype=dtype).movedim(-1, -3)


def _fake_up(y: Tensor, w: Tensor, b: Tensor, dtype: Dtype) -> Tensor:
    size = y.shape[3] * 2
    return y.new_empty(*y.shape[:2], size, size, w.shape[2], dtype=dtype).movedim(-1, -3)


def _fake_slope(x: Tensor, y: Tensor, dtype: Dtype) -> Tensor:
    return x.new_empty(len(x), y.shape[2], x.shape[2], 4, 4, dtype=torch.float32)


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
    ("down", "Tensor x, Tensor w, Tensor b", _down, _fake_down),
    ("up", "Tensor y, Tensor w, Tensor b", _up, _fake_up),
    ("slope", "Tensor x, Tensor y", _slope, _fake_slope),
):
    torch.library.define(f"vaedist::{_name}", f"({_arguments}, ScalarType dtype) -> Tensor")
    torch.library.impl(f"vaedist::{_name}", "CompositeExplicitAutograd", _work)
    torch.library.register_fake(f"vaedist::{_name}", _fake)
    torch.library.register_vmap(f"vaedist::{_name}", _over_replicas(_name))
torch.library.register_autograd("vaedist::down", _down_back, setup_context=_keep)
torch.library.register_autograd("vaedist::up", _up_back, setup_context=_keep)
