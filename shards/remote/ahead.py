"""Threads that fetch files, in the order in which they will be needed, before they are."""

import atexit
import threading
from collections import deque
from collections.abc import Callable, Sequence

from shards.manifest import File, ShardError
from shards.remote.fetch import StoppedError
from shards.remote.room import FullError, key_of

THREADS = 3
PAUSE = 0.5  # seconds between two looks whether other processes have made room


class Ahead:
    """Calls fetch(url, file, admitted) for the items of `add`, each of which is to be matched by one `taken`.

    `fetch` calls admitted() when the file has its room in the cache and the next item may look for its own. It raises
    FullError to be called again later, and StoppedError when `stopped` is set; other ShardErrors are for whoever takes
    the file.
    """

    def __init__(self, fetch: Callable[[str, File, Callable[[], None]], None]) -> None:
        self._fetch, self.stopped = fetch, threading.Event()
        self._changed = threading.Condition()
        self._waiting: deque[tuple[str, File]] = deque()
        self._begun: list[str] = []  # keys of files that are fetched or being fetched, and not taken yet, in order
        self._looking = False  # whether a thread looks for room: the others wait, or room would go to the wrong file
        self._threads: list[threading.Thread] = []

    def add(self, items: Sequence[tuple[str, File]]) -> None:
        """Fetch these after all that were added before."""
        with self._changed:
            self._waiting.extend(items)
            self._changed.notify_all()
        if not self._threads:
            self._threads = [threading.Thread(target=self._run, name="fetch", daemon=True) for _ in range(THREADS)]
            for thread in self._threads:
                thread.start()
            atexit.register(self.close)  # a thread that runs into the end of the interpreter may hang or abort it

    def taken(self, file: File) -> None:
        """Somebody has got the file, if need be by himself: one item of it is done with."""
        key = key_of(file)
        with self._changed:
            self._changed.notify_all()
            if key in self._begun:
                self._begun.remove(key)
                return
            for item in self._waiting:
                if key_of(item[1]) == key:
                    self._waiting.remove(item)
                    return

    def wanted(self) -> list[str]:
        """The keys of the files that have been begun and not taken yet, in the order in which they will be."""
        with self._changed:
            return list(self._begun)

    def close(self) -> None:
        """Returns when all threads have ended: at once, except for a download that has stalled."""
        self.stopped.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        atexit.unregister(self.close)

    def _run(self) -> None:
        try:
            while True:
                self._fetch_when_there_is_room(*self._next())
        except StoppedError:
            pass

    def _next(self) -> tuple[str, File]:
        with self._changed:
            self._changed.wait_for(lambda: self.stopped.is_set() or (self._waiting and not self._looking))
            if self.stopped.is_set():
                raise StoppedError
            url, file = self._waiting.popleft()
            self._begun.append(key_of(file))
            self._looking = True
            return url, file

    def _fetch_when_there_is_room(self, url: str, file: File) -> None:
        looking = True

        def admitted() -> None:
            nonlocal looking
            if looking:
                looking = False
                with self._changed:
                    self._looking = False
                    self._changed.notify_all()

        try:
            while not self.stopped.is_set():
                try:
                    return self._fetch(url, file, admitted)
                except FullError:
                    with self._changed:
                        self._changed.wait(PAUSE)
        except ShardError:
            pass  # such as a folder that is gone: whoever takes the file meets the same
        finally:
            admitted()
