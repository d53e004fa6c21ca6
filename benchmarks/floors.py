"""What no step goes below on a device: its products at the matrix rate, its bytes at the copy bandwidth."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from reference import Training
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

ADAM = 4 * 10  # bytes of a weight: read twice by the network; its gradient written; four numbers read, three written


class Rates(NamedTuple):
    """Of this device, measured."""

    flops: float  # a second, of a product of large matrices
    copied: float  # bytes read and written a second


class Work(NamedTuple):
    """Of a step, in the plain program."""

    flops: float
    bytes: float  # weights, gradients and moments, the images, and twice what the backward pass is given


def measure(device: torch.device, bf16: bool) -> Rates:
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    product, copy = torch.empty_like(matrix), torch.empty_like(block)
    return Rates(
        2 * size**3 / _shortest(lambda: torch.mm(matrix, matrix, out=product)),
        2 * len(block) / _shortest(lambda: copy.copy_(block)),
    )


def count(training: Training, pair: tuple[Tensor, Tensor]) -> Work:
    weights = [*training.vae.parameters()]
    if training.objective == "factorvae":
        weights += training.discriminator.parameters()
    known, saved = {weight.untyped_storage().data_ptr() for weight in weights}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage  # kept, so that its memory is given to no other
        return tensor

    with FlopCounterMode(display=False) as flops, saved_tensors_hooks(keep, lambda tensor: tensor):
        training.step(pair)
    moved = sum(storage.nbytes() for storage in saved.values())
    return Work(flops.get_total_flops(), 2 * moved + ADAM * sum(weight.numel() for weight in weights))


def _shortest(call: Callable[[], object]) -> float:
    """Seconds of one of several calls."""
    found = []
    for _ in range(10):
        start = time.perf_counter()
        call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)
