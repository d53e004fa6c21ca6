"""How the processes of a run end together: one of them says why, and none waits for one that is lost."""

import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from vaedist.checkpoint import WRITING
from vaedist.console import LOGS
from vaedist.world import awaited

PULSE = 0.5  # seconds between two looks at whether a process has ended the run
PATIENCE = 60.0  # seconds that a checkpoint may take which is being written at the end
ANSWER = 5.0  # seconds in which the processes that are left answer


class Peers:
    """The processes of a run, which meet in `store`, a c10d one; without it each is alone, and only rank 0 speaks.

    A thread waits for the end, since the main thread may by then be blocked in a collective with a lost process.
    """

    def __init__(self, rank: int, size: int, store: Any = None) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="peers", daemon=True)
        if store is not None:
            self._thread.start()

    def end(self, line: str) -> None:
        """Says why the run ends, unless another process has said why; then this one ends within seconds."""
        if self._speaks():
            self._say(line)

    def end_before_start(self, line: str) -> None:
        """The same for a signal: a launcher sends one to the others when a process dies."""
        if self._speaks():
            answers = self._answers()
            lost = [rank for rank in range(self.size) if rank not in answers]
            silent = f"{self._name(lost)} died or did not answer before the first step; start the same command again"
            self._say(silent if lost else line)

    def end_lost(self, error: RuntimeError) -> None:
        """The same for an error of `is_lost`, with the names of the ranks that do not answer."""
        if self._speaks():
            late, answers = "Timed out" in str(error), self._answers()
            # a process that is late for a collective is the one that waits in none, if it still answers at all
            lost = [rank for rank in range(self.size) if not (answers.get(rank) if late else rank in answers)]
            what = "did not answer in time" if late else "died or lost its connection"
            when = [f"during {awaited()}"] if awaited() else []
            words = " ".join([self._name(lost), what, *when, *getattr(error, "__notes__", ["before the first step"])])
            self._say(f"{words}; the same command resumes from the last checkpoint")

    def close(self) -> None:
        """The run ends well: the thread must not meet the interpreter's end."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _speaks(self) -> bool:
        """Whether this process is the first to end; for any other one, `_follow` ends it in here."""
        if self._store is None:
            return self.rank == 0
        try:
            if self._store.add("ending", 1) == 1:
                return True
        except RuntimeError:  # the store died with the launcher, or with the first node: better twice than never
            return True
        self._thread.join()
        return False

    def _name(self, ranks: list[int]) -> str:
        return f"rank {', '.join(map(str, ranks))} of {self.size}" if ranks else f"one of {self.size} ranks"

    def _say(self, line: str) -> None:
        print(f"vaedist: {line}", file=sys.stderr, flush=True)
        self._closed.set()
        with suppress(RuntimeError):
            if self._store is not None:
                self._store.set("said", line)

    def _answers(self) -> dict[int, str]:
        """What each rank that still answers waits for, nothing if it computes; of its own thread as of the others'."""
        if self._store is None:
            return {self.rank: awaited()}
        answers: dict[int, str] = {}
        until = time.monotonic() + ANSWER
        with suppress(RuntimeError):
            while len(answers) < self.size and time.monotonic() < until:
                for rank in set(range(self.size)) - answers.keys():
                    if self._store.check([f"rank {rank}"]):
                        answers[rank] = self._store.get(f"rank {rank}").decode()
                time.sleep(PULSE / 5)
        return answers

    def _follow(self) -> None:
        """Answers when a process ends the run, and ends this one when it has said why."""
        try:
            while not self._store.check(["ending"]):
                if self._closed.wait(PULSE):
                    return
            self._store.set(f"rank {self.rank}", awaited())
        except RuntimeError:
            return  # without a store: every process notices what it can, and says it
        until = time.monotonic() + 2 * ANSWER  # the one that was to speak may die too
        with suppress(RuntimeError):
            while not self._closed.wait(PULSE) and not self._store.check(["said"]) and time.monotonic() < until:
                pass
        if not self._closed.is_set():
            with suppress(RuntimeError):
                if LOGS in os.environ and self._store.check(["said"]):  # in this process's own log it is the only line
                    self._say(self._store.get("said").decode())
            WRITING.acquire(timeout=PATIENCE)
            os._exit(1)


def is_lost(error: RuntimeError) -> bool:
    """Whether it is what gloo or c10d raise when another process died or does not answer: they have no type for it."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or "gloo/transport" in str(error) or "pair closure" in str(error)
