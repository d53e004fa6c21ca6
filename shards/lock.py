"""One process or thread of a node does the work, the others wait for it."""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from shards.manifest import ShardError

PATIENCE = 5.0  # seconds of silent waiting


@contextmanager
def exclusive(path: Path, announce: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock file `path`; says so once if somebody else keeps it for long. ShardError if it cannot be made.

    The kernel lets go when the holder dies, however it dies. The file stays: unlinking it would let two processes in.
    """
    late = time.monotonic() + PATIENCE
    with _opened(path) as stream:
        while not try_lock(stream, path):
            time.sleep(0.1)
            if time.monotonic() > late:
                announce(f"waiting for another process or thread of this node, which holds {path}")
                late = float("inf")
        yield


@contextmanager
def attempt(path: Path) -> Iterator[bool]:
    """Holds the lock file `path` if nobody else does; yields whether it does. ShardError as above."""
    with _opened(path) as stream:
        yield try_lock(stream, path)


def try_lock(stream: IO[Any], path: Path, *, shared: bool = False) -> bool:
    """Locks the open file `path` until it is closed, unless another open file of it forbids that; says whether it did.

    Any number of open files can hold it `shared`, and only one that is not. ShardError where there are no locks.
    """
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        cure = "name a folder on a disk of this node"
        raise ShardError(f"{path}: this file system has no locks ({error.strerror}); {cure}") from None
    return True


def _opened(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a")
    except OSError as error:
        raise ShardError(f"{path}: cannot be written ({error.strerror}); name a folder of your own") from None
