"""Programs that make steps, in processes of their own, and take turns: what disturbs one disturbs all."""

import os
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import psutil
import torch
from torch.profiler import profile

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaMemsetAsync", "cudaGraphLaunch")
Program = Callable[[Callable[[], None]], None]  # makes steps without end and calls its argument after each


class Turn(NamedTuple):
    """Some steps, in seconds."""

    wall: float
    host: float  # until all calls had returned to a host with a GPU; without one the CPU time of threads and workers


class Done(BaseException):
    """No more steps are wanted."""


class Candidate:
    """A program, forked: nothing that it sets (threads, precision, memory) touches another one.

    Whoever makes one has not computed yet, nor asked for a GPU: neither threads nor a GPU survive a fork.
    """

    def __init__(self, program: Program, cores: int | None = None) -> None:
        """cores: how many it may use; None: all."""
        context = get_context("fork")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, program, cores))
        self._process.start()
        theirs.close()
        self.first: Turn = self._pipe.recv()

    def turn(self, steps: int) -> Turn:
        return self._ask(steps)

    def launches(self) -> int:
        """What a step has a GPU do; on a CPU the operations that call no others."""
        return self._ask(None)

    def memory(self) -> float:
        """Bytes at the peak: that torch has taken of a GPU, else of the process beyond its beginning."""
        return self._ask("memory")

    def close(self) -> None:
        self._pipe.send("done")
        self._process.join()

    def _ask(self, what: Any) -> Any:
        self._pipe.send(what)
        return self._pipe.recv()


def _serve(pipe: Connection, program: Program, cores: int | None) -> None:
    restrict(cores)
    try:
        program(_Baton(pipe))
    except Done:
        sys.stdout.flush()
        os._exit(0)  # threads may wait for ever


def restrict(cores: int | None) -> None:
    """This process to so many cores."""
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
        torch.set_num_threads(cores)


class _Baton:
    """Answers what was asked for before the step, or the steps, that just ended, and waits for the next question."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._left = pipe, 1
        self._profile: profile | None = None
        self._born, self._start = _peak(), _now()

    def __call__(self) -> None:
        self._left -= 1
        if self._left:
            return
        if self._profile is not None:
            self._profile.stop()
            self._pipe.send(_launches(self._profile))
            self._profile = None
        else:
            returned, (wall, cpu) = time.perf_counter() - self._start[0], _now()
            host = returned if torch.cuda.is_initialized() else cpu - self._start[1]
            self._pipe.send(Turn(wall - self._start[0], host))
        while (asked := self._pipe.recv()) == "memory":
            self._pipe.send(torch.cuda.max_memory_reserved() if torch.cuda.is_initialized() else _peak() - self._born)
        if asked == "done":
            raise Done
        if asked is None:
            self._profile = profile()
            self._profile.start()
        self._left, self._start = asked or 1, _now()


def _now() -> tuple[float, float]:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    workers = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return time.perf_counter(), time.process_time() + sum(used.user + used.system for used in workers)


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _launches(found: profile) -> int:
    events = found.events()
    launched = sum(event.name.startswith(LAUNCHES) for event in events)
    return launched or sum(event.name.startswith("aten::") and not event.cpu_children for event in events)
