"""Whether our own kernels are used here: they are tried first, since not every compiler and GPU has been seen."""

import os
import sys
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

_tried: dict[Hashable, bool] = {}


def trusted(what: Hashable, trial: Callable[[], str]) -> bool:
    """Whether `trial` found nothing wrong, once in a process; what it found, or raised, is said in one line."""
    if what not in _tried:
        try:
            why = trial()
        except torch.OutOfMemoryError:
            raise  # the caller lacks the memory, too
        except Exception as error:  # of a compiler, or for want of one
            why = str(error).partition("\n")[0] or type(error).__name__
        if why and all(_tried.values()) and os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"vaedist: this GPU does without kernels of our own, and is slower: {why}", file=sys.stderr)
        _tried[what] = not why
    return _tried[what]


def alike(*rows: Sequence[Tensor]) -> bool:
    """Whether tensors one below the other lie alike in memory."""
    return all(len(set(map(_layout, column))) == 1 for column in zip(*rows, strict=True))


def _layout(tensor: Tensor) -> tuple[int, ...]:
    """Where its numbers lie: along a side of one, such as the channels of grey images, any stride will do."""
    return tuple(stride for side, stride in zip(tensor.shape, tensor.stride(), strict=True) if side > 1)
