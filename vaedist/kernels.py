"""Triton kernels for a GPU: the convolutions of `convolution`, of several networks at once, Adam, the rounding of many
weights, the hash of `noise`.

A convolution is a product of matrices whose left one, the patches of the images, is gathered while it is multiplied.
Sums have the same order in every call. Images are [replicas, images, channels, size, size] in any layout, results have
their channels last in memory.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vaedist.layers import channels_last

ROWS = 64  # pixels of a block
FUSED = {"enable_fp_fusion": True}  # what triton is about to give up as its default
PARTS = 256  # of the sum over pixels that is the gradient of a weight
BLOCK = 1024  # numbers of a block, where a launch is for many tensors
TENSORS = 64  # of such a launch
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _patches(
    x, r, m, k, M, S, sr, sn, sc, sh, sw, C: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """The numbers k (row, column and channel in a window of 4 x 4) of the windows m, [m, k]."""
    H = S // 2
    n, i, j = (m // (H * H)).to(tl.int64), m // H % H, m % H
    y = 2 * i[:, None] - 1 + k[None, :] // (4 * C)
    z = 2 * j[:, None] - 1 + k[None, :] // C % 4
    inside = (m < M)[:, None] & (k < 16 * C)[None, :] & (y >= 0) & (y < S) & (z >= 0) & (z < S)
    at = x + r.to(tl.int64) * sr + n[:, None] * sn + (k % C)[None, :] * sc + y * sh + z * sw
    return tl.load(at, inside, 0.0).to(T)


@triton.jit
def _down(
    x, w, out, M, S, sr, sn, sc, sh, sw,
    C: tl.constexpr, O: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """w [replicas, O, 16 C], out [replicas, M, O]: the convolution."""
    r = tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    total = tl.zeros((BM, BO), tl.float32)
    for start in range(0, 16 * C, BK):
        k = start + tl.arange(0, BK)
        weights = tl.load(w + (r * O + o)[None, :] * 16 * C + k[:, None], (k < 16 * C)[:, None] & (o < O)[None, :], 0.0)
        patches = _patches(x, r, m, k, M, S, sr, sn, sc, sh, sw, C, T)
        total = tl.dot(patches, weights.to(T), total, input_precision=P)
    at = out + (r.to(tl.int64) * M + m)[:, None] * O + o[None, :]
    tl.store(at, total, (m < M)[:, None] & (o < O)[None, :])


@triton.jit
def _up(
    y, w, out, N, S, sr, sn, sc, sh, sw,
    C: tl.constexpr, O: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    """w [replicas, 4 O, 4 C], out [replicas, N, S, S, C]: the transposed convolution.

    A window of 2 x 2 numbers of y is all that the 2 x 2 pixels in its middle depend on.
    """
    H = S // 2
    r = tl.program_id(2)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BJ + tl.arange(0, BJ)
    n, p, q = (m // ((H + 1) * (H + 1))).to(tl.int64), m // (H + 1) % (H + 1), m % (H + 1)
    total = tl.zeros((BM, BJ), tl.float32)
    for start in range(0, 4 * O, BK):
        k = start + tl.arange(0, BK)
        known = (k < 4 * O)[:, None] & (j < 4 * C)[None, :]
        weights = tl.load(w + (r * 4 * O + k)[:, None] * 4 * C + j[None, :], known, 0.0)
        i = p[:, None] - k[None, :] // (2 * O)
        l = q[:, None] - k[None, :] // O % 2
        inside = (n < N)[:, None] & (k < 4 * O)[None, :] & (i >= 0) & (i < H) & (l >= 0) & (l < H)
        at = y + r.to(tl.int64) * sr + n[:, None] * sn + (k % O)[None, :] * sc + i * sh + l * sw
        total = tl.dot(tl.load(at, inside, 0.0).to(T), weights.to(T), total, input_precision=P)
    c, row, column = j % C, 2 * p[:, None] - 1 + j[None, :] // (2 * C), 2 * q[:, None] - 1 + j[None, :] // C % 2
    inside = (n < N)[:, None] & (j < 4 * C)[None, :] & (row >= 0) & (row < S) & (column >= 0) & (column < S)
    at = out + (((r.to(tl.int64) * N + n)[:, None] * S + row) * S + column) * C + c[None, :]
    tl.store(at, total, inside)


@triton.jit(do_not_specialize=["blocks"])
def _weight(
    x, y, out, M, S, sr, sn, sc, sh, sw, tr, tn, tc, th, tw, blocks,
    C: tl.constexpr, O: tl.constexpr, T: tl.constexpr, P: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """out [replicas, parts, O, 16 C]: of some blocks of windows the sum of what each has of the gradient."""
    H = S // 2
    part, r = tl.program_id(0), tl.program_id(2)
    k = tl.program_id(1) // TILES * BK + tl.arange(0, BK)
    o = tl.program_id(1) % TILES * BO + tl.arange(0, BO)
    total = tl.zeros((BK, BO), tl.float32)
    for block in range(part * blocks, (part + 1) * blocks):
        m = block * BM + tl.arange(0, BM)
        n, i, j = (m // (H * H)).to(tl.int64), m // H % H, m % H
        at = y + r.to(tl.int64) * tr + (n * tn + i * th + j * tw)[:, None] + o[None, :] * tc
        slopes = tl.load(at, (m < M)[:, None] & (o < O)[None, :], 0.0).to(T)
        patches = _patches(x, r, m, k, M, S, sr, sn, sc, sh, sw, C, T)
        total = tl.dot(tl.trans(patches), slopes, total, input_precision=P)
    at = out + ((r * tl.num_programs(0) + part).to(tl.int64) * O + o)[None, :] * 16 * C + k[:, None]
    tl.store(at, total, (k < 16 * C)[:, None] & (o < O)[None, :])


def _on_its_device(launch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """triton launches on the current device, wherever the tensors are."""

    @wraps(launch)
    def there(tensor: Tensor, *more: Any) -> Tensor:
        with torch.cuda.device_of(tensor):
            return launch(tensor, *more)

    return there


@_on_its_device
def down(x: Tensor, w: Tensor, dtype: torch.dtype, tf32: bool) -> Tensor:
    """The convolution of x [R, N, C, S, S] by w [R, O, C, 4, 4]: [R, N, O, S/2, S/2] in `dtype`."""
    (replicas, images, channels, size, _), outputs = x.shape, w.shape[1]
    half, w = size // 2, channels_last(w.to(dtype))
    out = x.new_empty(replicas, images, half, half, outputs, dtype=dtype)
    rows, block = images * half * half, _block(outputs, 64)
    grid = triton.cdiv(rows, ROWS), triton.cdiv(outputs, block), replicas
    _down[grid](
        x, w, out, rows, size, *x.stride(), channels, outputs, *_precision(dtype, tf32), ROWS,
        _block(16 * channels, 64), block, **FUSED,
    )  # fmt: skip
    return out.movedim(-1, -3)


@_on_its_device
def up(y: Tensor, w: Tensor, dtype: torch.dtype, tf32: bool) -> Tensor:
    """The transposed one of y [R, N, O, S/2, S/2] by w [R, O, C, 4, 4]: [R, N, C, S, S] in `dtype`."""
    (replicas, images, inputs, half, _), channels, size = y.shape, w.shape[2], 2 * y.shape[3]
    folded = w.to(dtype).view(replicas, inputs, channels, 2, 2, 2, 2)  # row: near or far, parity; column likewise
    columns = folded.permute(0, 3, 5, 1, 4, 6, 2).contiguous()
    out = y.new_empty(replicas, images, size, size, channels, dtype=dtype)
    rows, block = images * (half + 1) ** 2, _block(4 * channels, 64)
    grid = triton.cdiv(rows, ROWS), triton.cdiv(4 * channels, block), replicas
    _up[grid](
        y, columns, out, images, size, *y.stride(), channels, inputs, *_precision(dtype, tf32), ROWS,
        _block(4 * inputs, 64), block, **FUSED,
    )  # fmt: skip
    return out.movedim(-1, -3)


@_on_its_device
def weight(x: Tensor, y: Tensor, dtype: torch.dtype, tf32: bool) -> Tensor:
    """The gradient of the weight, [R, O, C, 4, 4] in float32, of x [R, N, C, S, S] and y [R, N, O, S/2, S/2]."""
    (replicas, images, channels, size, _), outputs, half = x.shape, y.shape[2], y.shape[3]
    rows, block, other = images * half * half, _block(16 * channels, 64), _block(outputs, 64)
    tiles = triton.cdiv(outputs, other)
    all_tiles, blocks = tiles * triton.cdiv(16 * channels, block), triton.cdiv(rows, ROWS)
    each = triton.cdiv(blocks, max(1, PARTS // (all_tiles * replicas)))
    parts = triton.cdiv(blocks, each)
    out = x.new_empty(replicas, parts, outputs, 4, 4, channels, dtype=torch.float32)
    _weight[(parts, all_tiles, replicas)](
        x, y, out, rows, size, *x.stride(), *y.stride(), each, channels, outputs, *_precision(dtype, tf32), ROWS,
        block, other, tiles, **FUSED,
    )  # fmt: skip
    return out.sum(1).movedim(-1, -3)


def _block(numbers: int, most: int) -> int:
    """A side of a block, of 16 at least, as the product of matrices wants it."""
    return min(most, max(16, triton.next_power_of_2(numbers)))


def _precision(dtype: torch.dtype, tf32: bool) -> tuple[tl.dtype, str]:
    return TYPES[dtype], "tf32" if tf32 else "ieee"


@triton.jit
def _adam(
    W, G, A, B, T, scale, skipped, STARTS: tl.constexpr, SIZES: tl.constexpr,
    LR: tl.constexpr, BETA: tl.constexpr, GAMMA: tl.constexpr, LN_BETA: tl.constexpr, LN_GAMMA: tl.constexpr,
    DECAY: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights, gradients, both moments and counts of steps; a tensor's blocks begin at its number in STARTS."""
    block = tl.program_id(0)
    w, g, a, b, t, start, size = W[0], G[0], A[0], B[0], T[0], 0, SIZES[0]
    for i in tl.static_range(1, len(SIZES)):
        here = block >= STARTS[i]
        w, g, t = tl.where(here, W[i], w), tl.where(here, G[i], g), tl.where(here, T[i], t)
        a, b = tl.where(here, A[i], a), tl.where(here, B[i], b)
        start, size = tl.where(here, STARTS[i], start), tl.where(here, SIZES[i], size)
    if skipped is not None:
        size = tl.where(tl.load(skipped) > 0, 0, size)
    at = (block - start).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # A mask that may end at any number, as a bias of 3 does, would have every tensor read and written number by number.
    if (block - start + 1) * BLOCK <= size:
        _moved(w, g, a, b, t, scale, at, None, LR, BETA, GAMMA, LN_BETA, LN_GAMMA, DECAY, EPS)
    else:
        _moved(w, g, a, b, t, scale, at, at < size, LR, BETA, GAMMA, LN_BETA, LN_GAMMA, DECAY, EPS)


@triton.jit
def _moved(
    w, g, a, b, t, scale, at, known,
    LR: tl.constexpr, BETA: tl.constexpr, GAMMA: tl.constexpr, LN_BETA: tl.constexpr, LN_GAMMA: tl.constexpr,
    DECAY: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """One block's numbers, those of them that are `known`."""
    slope = tl.load(g + at, known)
    if scale is not None:
        slope = tl.div_rn(slope, tl.load(scale))
    count = tl.load(t).to(tl.float64)  # in float32, 1 - 0.999 has three digits less
    rate = tl.full((), LR, tl.float64) / (1 - tl.exp(count * tl.full((), LN_BETA, tl.float64)))
    root = tl.sqrt(1 - tl.exp(count * tl.full((), LN_GAMMA, tl.float64)))
    mean = BETA * tl.load(a + at, known) + (1 - BETA) * slope
    square = GAMMA * tl.load(b + at, known) + (1 - GAMMA) * slope * slope
    weight = tl.load(w + at, known) * (1 - LR * DECAY)
    weight -= rate.to(tl.float32) * tl.div_rn(mean, tl.div_rn(tl.sqrt_rn(square), root.to(tl.float32)) + EPS)
    tl.store(w + at, weight, known)
    tl.store(a + at, mean, known)
    tl.store(b + at, square, known)


def adam(
    rows: Sequence[Sequence[Tensor]], scale: Tensor | None, skipped: Tensor | None,
    lr: float, beta: float, gamma: float, decay: float, eps: float,
) -> None:  # fmt: skip
    """As `adam.at_once`."""
    logarithms = [math.log(number) if number else -1e9 for number in (beta, gamma)]
    with torch.cuda.device_of(rows[0][0]):
        for these, starts, sizes, blocks in _launches(rows):
            _adam[(blocks,)](
                *these, scale, skipped, starts, sizes, lr, beta, gamma, *logarithms, decay, eps, BLOCK, **FUSED
            )


@triton.jit
def _copied(A, B, STARTS: tl.constexpr, SIZES: tl.constexpr, BLOCK: tl.constexpr):
    """Numbers of the tensors B into A; blocks as in `_adam`."""
    block = tl.program_id(0)
    a, b, start, size = A[0], B[0], 0, SIZES[0]
    for i in tl.static_range(1, len(SIZES)):
        here = block >= STARTS[i]
        a, b = tl.where(here, A[i], a), tl.where(here, B[i], b)
        start, size = tl.where(here, STARTS[i], start), tl.where(here, SIZES[i], size)
    at = (block - start).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if (block - start + 1) * BLOCK <= size:
        tl.store(a + at, tl.load(b + at))
    else:
        tl.store(a + at, tl.load(b + at, at < size), at < size)


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Each source's numbers into its target, rounded to its type; they lie alike in memory, without gaps."""
    with torch.cuda.device_of(targets[0]):
        for (to, of), starts, sizes, blocks in _launches([targets, sources]):
            _copied[(blocks,)](to, of, starts, sizes, BLOCK, **FUSED)


def _launches(
    rows: Sequence[Sequence[Tensor]],
) -> Iterator[tuple[list[tuple[Tensor, ...]], tuple[int, ...], tuple[int, ...], int]]:
    """Some columns of the rows for each launch, where their blocks begin, their sizes, and the number of blocks."""
    for first in range(0, len(rows[0]), TENSORS):
        these = [tuple(row[first : first + TENSORS]) for row in rows]
        sizes = tuple(tensor.numel() for tensor in these[0])
        *starts, blocks = itertools.accumulate((triton.cdiv(size, BLOCK) for size in sizes), initial=0)
        yield these, tuple(starts), sizes, blocks


@triton.jit(do_not_specialize=["key"])
def _hashed(positions, out, key, count, columns, GOLDEN: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = _mix(tl.load(positions + i // columns, i < count, 0) * GOLDEN + key, A, B)
    tl.store(out + i, _mix(rows + (i % columns + 1).to(tl.int64) * GOLDEN, A, B), i < count)


@triton.jit
def _mix(bits, A: tl.constexpr, B: tl.constexpr):
    bits = (bits ^ ((bits >> 30) & 0x3FFFFFFFF)) * A
    bits = (bits ^ ((bits >> 27) & 0x1FFFFFFFFF)) * B
    return bits ^ ((bits >> 31) & 0x1FFFFFFFF)


@_on_its_device
def hashed(positions: Tensor, key: int, columns: int, golden: int, first: int, second: int) -> Tensor:
    """As `noise.hashed`, with its constants."""
    out = positions.new_empty(*positions.shape, columns)
    count, block = out.numel(), 512
    _hashed[(triton.cdiv(count, block),)](
        positions.contiguous(), out, key, count, columns, golden, first, second, block, **FUSED
    )
    return out
