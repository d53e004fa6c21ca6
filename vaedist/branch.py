"""Work of a step that what follows does not wait for: in a CUDA graph a branch of its own, where a GPU has room for it.

The kernels of a small batch fill a part of a GPU, one after the other. Elsewhere nothing is gained: launches, not
kernels, take the time of a step that is no graph, and there `beside` is a call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass
class _Branch:
    stream: torch.cuda.Stream
    left: bool = False  # the rest has something to wait for
    held: list[Any] = field(default_factory=list)


_branch: _Branch | None = None  # while a step is captured


@dataclass(frozen=True)
class Beside(Generic[T]):
    """`value` is for what goes on beside, too; everybody else asks for the `result`, and waits for it."""

    value: T
    stream: torch.cuda.Stream | None = None

    def result(self) -> T:
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        return self.value


def beside(work: Callable[..., T], *given: Any) -> Beside[T]:
    """`work` of what was given, beside what is computed until its `result` is asked for; so is its backward pass."""
    if _branch is None:
        return Beside(work(*given))
    _branch.stream.wait_stream(torch.cuda.current_stream())
    _branch.left = True
    with torch.cuda.stream(_branch.stream):
        value = work(*given)
    hold(given, value)
    return Beside(value, _branch.stream)


def hold(*read: Any) -> None:
    """What one branch has made and the other reads, until `met`: its memory is given to no other.

    The allocator would: it knows the order of the work on the branch that has made it, and nothing of the other one.
    """
    if _branch is not None:
        _branch.held.append(read)


def met() -> None:
    """The backward pass has ended, in which both branches have."""
    if _branch is not None:
        _branch.held.clear()


@contextmanager
def branching(stream: torch.cuda.Stream) -> Iterator[None]:
    """Within the capture of a step: work that is asked for `beside` the rest goes to this stream."""
    global _branch
    _branch = branch = _Branch(stream)
    try:
        yield
    finally:
        if branch.left:  # also where the step has failed: a capture ends on one stream
            with suppress(RuntimeError):  # of one that is broken off
                torch.cuda.current_stream().wait_stream(branch.stream)
        _branch = None
