"""Keeps the files of a cache below a limit, whatever the number of processes that fill it."""

import glob
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.lock import attempt, exclusive, try_lock
from shards.manifest import File, ShardError

FILE = re.compile(r"[0-9a-f]{16}-.+")
GRACE = 5.0  # seconds in which a file that another thread or process only checks is let go
PAUSE = 0.1  # seconds between two looks whether the downloads of others have ended


def key_of(file: File) -> str:
    """The name of a file in a cache: files of other bytes have other names."""
    if not re.fullmatch("[0-9a-f]{64}", file.sha256):
        raise ShardError(f"{file.name}: {file.sha256!r} is not a sha256")
    return f"{file.sha256[:16]}-{Path(file.name).name}"


class FullError(ShardError):
    """There is no room now."""


class Room:
    """The files `<sha256[:16]>-<name>` of a directory, and how many bytes of them there may be; None: any number.

    Whoever makes, replaces or removes the file of a key holds the lock file `.<key>.lock`. While it downloads, the lock
    file contains the bytes that will be needed: they count as used, and those of a downloader that was killed can be
    told by the lock being free. Whoever uses a file holds a shared lock of the file itself.
    """

    def __init__(self, directory: Path, limit: int | None, announce: Callable[[str], None]) -> None:
        self.directory, self.limit, self.announce = directory, limit, announce

    def lock(self, key: str) -> Path:
        """The lock file of a key; it is never removed."""
        return self.directory / f".{key}.lock"

    @contextmanager
    def reserved(self, key: str, size: int, spared: Sequence[str], *, patient: bool) -> Iterator[None]:
        """Room for `size` bytes while the lock of `key` is held. The files used longest ago make room for it.

        Those `spared` do so only if `patient`, the last of them first. FullError if that is not enough, and ShardError
        if it never can be; who is patient first waits for the downloads of others, whose files may go then, and `GRACE`
        seconds for files in use to be released.
        """
        if self.limit is not None and size > self.limit:
            raise ShardError(f"{self.directory}: {key} has {size:,} bytes, the limit is {self.limit:,}; raise it")
        late = time.monotonic() + GRACE
        while (kept := self._reserve(key, size, spared, patient)) is not None:
            assert self.limit is not None
            if not patient or (kept + size > self.limit and time.monotonic() > late):
                used = f"{kept:,} of the limit of {self.limit:,} bytes are in use"
                raise FullError(f"{self.directory}: no room for {key}, {size:,} bytes: {used}; raise the limit")
            time.sleep(PAUSE)
        try:
            yield
        finally:
            self.lock(key).write_text("")

    def sweep(self) -> int:
        """Removes what killed downloaders have left; returns the bytes that living ones have reserved."""
        reserved = 0
        for path in self.directory.glob(".*.lock"):
            if path.stat().st_size == 0:
                continue
            with attempt(path) as free:
                if free:
                    self.clear(path.name[1 : -len(".lock")])
                else:
                    reserved += int(path.read_text() or 0)  # empty: it has ended since
        return reserved

    def clear(self, key: str) -> None:
        """Removes what a killed downloader has left of a key, whose lock is held."""
        for draft in self.directory.glob(f".{glob.escape(key)}.*.part"):
            draft.unlink(missing_ok=True)
        self.lock(key).write_text("")

    def _reserve(self, key: str, size: int, spared: Sequence[str], patient: bool) -> int | None:
        """None if there is room now, else the bytes of the files that could not be removed."""
        with exclusive(self.directory / ".room.lock", self.announce):
            if self.limit is not None:
                coming = self.sweep()  # before the files are listed: a download that ends is counted twice, not never
                target = self.limit - coming - size
                kept = self._shrink(target, spared, patient)
                if kept > target:
                    return kept
            self.lock(key).write_text(str(size))
            return None

    def _shrink(self, target: int, spared: Sequence[str], patient: bool) -> int:
        """Removes files until they have `target` bytes or no other can go; returns the bytes they have then."""
        files = []
        for entry in os.scandir(self.directory):
            if FILE.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    late = entry.name in spared
                    rank = (late, -spared.index(entry.name) if late else status.st_mtime_ns)
                    files.append((rank, status.st_size, entry.name))
        left = sum(size for _, size, _ in files)
        for (late, _), size, key in sorted(files):
            if left > target and (patient or not late) and self._evict(key):
                left -= size
        return left

    def _evict(self, key: str) -> bool:
        """Removes the file of a key unless somebody uses it, or is about to."""
        path = self.directory / key
        with attempt(self.lock(key)) as free:
            if not free:
                return False
            try:
                with path.open("rb") as stream:
                    unused = try_lock(stream, path)
                    if unused:
                        path.unlink()
                    return unused
            except FileNotFoundError:
                return True
