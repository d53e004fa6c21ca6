"""A run is asked to stop by a signal: before its first step it ends at once, after that between two steps, saved.

A file in its directory may ask the same, or for a checkpoint.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REQUEUE = "REQUEUE"  # the file in the run directory that asks for the same command: launchers make every status a 1
COMPLETE = "COMPLETE"  # and the one that says that nothing is left to be done
FILES = {1: "SAVE", 255: "STOP"}  # that a person may put there; in a vote beside signals the largest number counts
SAVE, STOP = FILES
LOOK = 1.0  # seconds between two looks for them
PR_SET_PDEATHSIG = 1


class StoppedError(BaseException):
    """The run ends because a signal asked for it; like KeyboardInterrupt it is no error that anybody could handle."""

    def __init__(self, number: int, step: int | None = None) -> None:
        self.step = step  # after which all was saved; none was made
        self.requeue = number not in (signal.SIGINT, STOP)  # a person knows when to go on
        self.status = 128 + number if number == signal.SIGINT else os.EX_TEMPFAIL
        when = "before the first step" if step is None else f"at step {step}"
        by = f"the file {FILES[number]}" if number in FILES else signal.Signals(number).name
        super().__init__(f"stopped {when} by {by}; the same command resumes")


class Stop:
    """While it is entered, the signals that ask a run to stop are noted; where nothing waits for it, see `at_once`.

    A launcher and a scheduler may each send theirs, so that a second one changes nothing; but a second Ctrl-C kills.
    """

    def __init__(self) -> None:
        self.asked = 0  # the signal
        self._raises = False

    def __enter__(self) -> "Stop":
        self._before: dict[int, Any] = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While it is entered, or until `patiently`, a signal raises StoppedError."""
        self._raises = True
        try:
            yield
        finally:
            self._raises = False

    def patiently(self) -> None:
        """From now on there is something to save."""
        self._raises = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = self.asked or number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        if self._raises:
            self._raises = False
            raise StoppedError(number)


class Requests:
    """The files in run directories with which a person asks for something; one file counts for all of them."""

    def __init__(self, runs: Sequence[Path]) -> None:
        self._runs, self._next, self._told = runs, 0.0, False

    def __call__(self) -> int:
        """STOP, or once SAVE, or 0; the disk is asked once a second."""
        if not self._runs or time.monotonic() < self._next:
            return 0
        self._next = time.monotonic() + LOOK
        if any((run / FILES[STOP]).exists() for run in self._runs):
            return STOP
        told, self._told = self._told, any((run / FILES[SAVE]).exists() for run in self._runs)
        return SAVE if self._told and not told else 0

    def granted(self, number: int) -> None:
        """The file has had its effect: it is removed, which tells the person so."""
        for run in self._runs:
            (run / FILES[number]).unlink(missing_ok=True)
        self._told = False  # the next file is another one


def ask_again(run: Path) -> None:
    """Leaves REQUEUE in the directory of a run, if there is one."""
    with suppress(OSError):  # what ends the run matters more
        if run.exists():
            (run / REQUEUE).touch()


def follow_launcher() -> None:
    """Has the kernel send SIGTERM when the launcher dies: its workers would train on, unseen, in the run directory."""
    launched = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
