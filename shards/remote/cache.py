"""Files from elsewhere on a disk of this node: each is downloaded once, whatever the number of processes."""

import hashlib
import os
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from shards.lock import attempt, exclusive, try_lock
from shards.manifest import File, ShardError
from shards.remote.ahead import Ahead
from shards.remote.fetch import StoppedError, download
from shards.remote.room import FullError, Room, key_of


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Cache:
    """The files of `directory`, named by their content, with at most `limit` bytes together (None: without limit).

    Any number of processes and threads may use the same directory at once. ShardErrors are one line.
    """

    def __init__(self, directory: Path, limit: int | None = None, announce: Callable[[str], None] = _say) -> None:
        self.directory, self._announce = directory, announce
        self._room = Room(directory, limit, announce)
        with self._explained():
            self._room.sweep()
        self._guard = threading.Lock()  # of the pins
        self._pins: dict[str, list[BufferedReader]] = defaultdict(
            list
        )  # open files, which the kernel unlocks if we die
        self._checked: set[str] = set()  # keys whose bytes this process has seen to be right
        self._failed: dict[str, Exception] = {}  # of prefetching; set and taken with the key's lock held
        self._ahead = Ahead(self._fetch_ahead)

    def get(self, url: str, file: File) -> Path:
        """The file on this disk, from `url` if it is not here yet; it stays at least until its `release`.

        Every `get` needs a `release` of its own. ShardError if it cannot be had, or if prefetching it failed.
        """
        key = key_of(file)
        with self._explained(), exclusive(self._room.lock(key), self._announce):
            try:
                failed = self._failed.pop(key, None)
                stream = self._present(key, file)
                if stream is None and failed is not None:
                    raise failed
                stream = stream or self._fetched(url, key, file)
            finally:
                self._ahead.taken(file)  # not before it is pinned: it would be the first to make room for others
        with self._guard:
            self._pins[key].append(stream)
        return self.directory / key

    def release(self, file: File) -> None:
        """Undo one `get`: the file may make room for others now, although whoever has it open can go on reading it."""
        with self._guard:
            self._pins[key_of(file)].pop().close()

    def prefetch(self, items: Sequence[tuple[str, File]]) -> None:
        """Begin to fetch these (url, file) in this order, in the background; one `get` for each is to follow.

        They do not push out one another, but wait until those before have been got and released. What goes wrong is
        raised by the `get` of the file.
        """
        self._ahead.add(items)

    def cancel(self, file: File) -> None:
        """Undo one item of `prefetch`: no `get` will come. What is here already may make room for others."""
        self._ahead.taken(file)

    def close(self) -> None:
        """Ends prefetching, within `STALL` seconds at worst, and releases all files."""
        self._ahead.close()
        with self._guard:
            for streams in self._pins.values():
                for stream in streams:
                    stream.close()
            self._pins.clear()

    def _fetch_ahead(self, url: str, file: File, admitted: Callable[[], None]) -> None:
        key = key_of(file)
        with attempt(self._room.lock(key)) as free:
            if not free or key not in self._ahead.wanted():
                return  # somebody else is at it, for whom `get` will wait if need be; or `get` has had it meanwhile
            try:
                (self._present(key, file) or self._fetched(url, key, file, admitted)).close()
            except (FullError, StoppedError):
                raise
            except Exception as error:  # whatever it is: `get` will raise it
                self._failed[key] = error

    def _present(self, key: str, file: File) -> BufferedReader | None:
        """The file of a key whose lock is held, open and pinned; None if it is not here, or was bad and is removed."""
        path = self.directory / key
        try:
            stream = path.open("rb")
        except FileNotFoundError:
            return None
        if os.fstat(stream.fileno()).st_size != file.bytes or not self._right(key, file, stream):
            self._announce(f"{path}: its bytes have changed on the disk; fetching it again")
            stream.close()
            path.unlink()
            return None
        return self._pinned(stream, path)

    def _right(self, key: str, file: File, stream: BufferedReader) -> bool:
        if key not in self._checked and hashlib.file_digest(stream, "sha256").hexdigest() == file.sha256:
            self._checked.add(key)
        return key in self._checked

    def _fetched(self, url: str, key: str, file: File, admitted: Callable[[], None] | None = None) -> BufferedReader:
        """The file of a key whose lock is held, from its source, open and pinned; `admitted` if it is not urgent."""
        path = self.directory / key
        self._room.clear(key)
        with self._room.reserved(key, file.bytes, self._ahead.wanted(), patient=admitted is None):
            if admitted is not None:
                admitted()
            stopped = None if admitted is None else self._ahead.stopped
            download(url, path, size=file.bytes, sha256=file.sha256, stopped=stopped)
            self._checked.add(key)
            return self._pinned(path.open("rb"), path)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            cure = "make room or name a folder of your own"
            raise ShardError(f"{error.filename or self.directory}: {error.strerror}; {cure}") from None

    def _pinned(self, stream: BufferedReader, path: Path) -> BufferedReader:
        locked = try_lock(stream, path, shared=True)
        assert locked, path  # only who holds the key's lock, as we do, locks the file for itself
        os.utime(path)  # the time of the last use, by which the oldest is found when room is needed
        return stream
