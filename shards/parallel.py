"""Running jobs in fresh processes, in order, with a progress display."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from shards.manifest import ShardError

Job = TypeVar("Job")
Result = TypeVar("Result")
SECONDS_BETWEEN_LINES = 5.0
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of all cores, in a period of so many: `docker run --cpus`


def cores() -> int:
    """The CPU cores this process may use, at least one: of the machine, of a job's share, of a container's."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # it is not there, or says "max"
        quota, period = map(int, QUOTA.read_text().split())
        count = min(count, -(-quota // period))
    return count


def each(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """function(job) for every job, in order, in `workers` processes; in this process if one is enough.

    The processes are spawned, not forked, so that a caller with threads or a GPU is safe. As always with spawned
    processes, a script that calls this needs its `if __name__ == "__main__":`.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        # Ctrl-C reaches the whole group, but the caller alone decides what it means: the workers inherit the mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            results = pool.map(function, jobs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield from results
    except BrokenProcessPool:
        hint = 'killed, out of memory, or the calling script has no `if __name__ == "__main__":`'
        raise ShardError(f"a worker process died ({hint}); try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def shown(
    results: Iterable[Result], counts: Sequence[int], verb: str, quiet: bool, unit: str = "images"
) -> Iterator[Result]:
    """The results unchanged, while stderr shows how many of sum(counts) units are done; counts[i] is result i's."""
    terminal = sys.stderr.isatty()
    total, done, start = sum(counts), 0, time.monotonic()
    last = start
    with tqdm(total=total, desc=verb, unit=f" {unit}", leave=False, disable=quiet or not terminal) as bar:
        for result, count in zip(results, counts, strict=True):
            done += count
            bar.update(count)
            now = time.monotonic()
            if not quiet and not terminal and now - last > SECONDS_BETWEEN_LINES:
                last = now
                print(f"{verb} {done:,} of {total:,} {unit}, {done / (now - start):,.0f} {unit}/s", file=sys.stderr)
            yield result


def _start_worker() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # a process a core: the threads of a library would wait for each other
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """A worker of a killed caller would otherwise wait for its next job for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
