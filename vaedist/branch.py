"""Work of a step that what follows does not wait for: in a CUDA graph a branch of its own, where a GPU has room for it.

The kernels of a small batch fill a part of a GPU, one after the other. Elsewhere nothing is gained: launches, not
kernels, take the time of a step that is no graph, and there `beside` is a call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import torch

T = TypeVar("T")
P = ParamSpec("P")

_stream: torch.cuda.Stream | None = None  # of the branch, while a step is captured
_held: list[Any] = []


@dataclass(frozen=True)
class Beside(Generic[T]):
    """`value` is for what goes on beside, too; everybody else asks for the `result`, and waits for it."""

    value: T
    stream: torch.cuda.Stream | None = None

    def result(self) -> T:
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        return self.value


def beside(work: Callable[P, T], *given: P.args, **named: P.kwargs) -> Beside[T]:
    """`work` of what was given, beside what is computed until its `result` is asked for; so is its backward pass."""
    if _stream is None:
        return Beside(work(*given, **named))
    _stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(_stream):
        value = work(*given, **named)
    hold(given, named, value)
    return Beside(value, _stream)


def hold(*read: Any) -> None:
    """What one branch has made and the other reads, in its backward pass too: its memory is given to no other.

    The allocator would: it knows the order of the work on the branch that has made it, and nothing of the other one.
    """
    if _stream is not None:
        _held.append(read)


@contextmanager
def branching(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """While a step is captured: work that is asked for `beside` the rest goes to this stream, if there is one."""
    global _stream
    _stream = stream
    try:
        yield
    finally:
        _stream = None
        _held.clear()
