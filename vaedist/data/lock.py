"""One process of a node does the work, the others wait for it."""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from shards.manifest import ShardError

PATIENCE = 5.0  # seconds of silent waiting


@contextmanager
def exclusive(path: Path, announce: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock file `path`; says so once if another process keeps it for long. ShardError if it cannot be made.

    The kernel lets go when the holder dies, however it dies. The file stays: unlinking it would let two processes in.
    """
    late = time.monotonic() + PATIENCE
    with _opened(path) as stream:
        while not _try_lock(stream.fileno(), path):
            time.sleep(0.1)
            if time.monotonic() > late:
                announce(f"waiting for another process of this node, which holds {path}")
                late = float("inf")
        yield


def _opened(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a")
    except OSError as error:
        raise ShardError(f"{path}: cannot be written ({error.strerror}); name a folder of your own") from None


def _try_lock(handle: int, path: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        error.filename = str(path)  # a file system without locks; the system does not say where
        raise
    return True
