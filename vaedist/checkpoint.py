"""The state of a run as directories of safetensors and JSON that say nothing of processes, devices or precision.

python -m vaedist.checkpoint inspect|verify PATH    a run, its checkpoints, or one of them
"""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from shards.files import sync_directory
from vaedist.config import bounded

if TYPE_CHECKING:  # the commands need no torch, which takes seconds to import
    from torch import Tensor

STATE, WEIGHTS, OPTIMIZER = "state.json", "weights.safetensors", "optimizer.safetensors"
AVERAGED = "averaged.safetensors"  # of a run with train.ema: the weights to use, by the names of WEIGHTS
SUMS = "SHA256SUMS"  # of the other files, for `sha256sum --check`
EMA = "/ema"
WRITING = threading.Lock()  # whoever ends this process on the word of another one waits for it
FORMAT = 1  # of all this; a checkpoint that does not say is of the first
LARGEST_STATE = 2**26  # bytes of STATE, a thousand times what a run has
# What reading anything but a whole checkpoint raises.
NOT_WHOLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)
ADVICE = {
    errno.ENOSPC: "make room on this disk",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "this disk or `ulimit -f` allows no file of that size",
    errno.EIO: "the disk fails, have it looked at",
}


class CheckpointError(Exception):
    """A checkpoint that cannot be used or made; the message is one line for the user."""


class DamagedError(CheckpointError):
    """A checkpoint that is not whole; the one before it may be."""


@dataclass
class Progress:
    """The one clock of a run: optimiser steps made, or in fp16 skipped, and images consumed by all ranks together."""

    step: int = 0
    seen: int = 0


@dataclass(frozen=True, kw_only=True)
class Config:
    every: int = bounded(1000, at_least=1)  # steps; the last step is always saved
    keep: int = bounded(3, at_least=1)  # the newest so many
    keep_every: int | None = bounded(None, at_least=1)  # steps; of a multiple of these, every one is kept for ever
    required: bool = True  # false: where the disk is full training goes on, and only the last one must be saved


@dataclass(frozen=True, kw_only=True)
class State:
    """All of a run between two steps, of all ranks together; its tensors lie in memory of their own, on the CPU."""

    progress: Progress
    meters: list[dict[str, float]]
    scaling: dict[str, float]  # of the loss in fp16, else nothing
    data: str
    recipe: dict[str, Any]
    weights: dict[str, "Tensor"]  # and buffers, by name
    moments: dict[str, "Tensor"]  # of the optimiser, by PARAMETER/NAME; averaged weights are the moments called EMA


@dataclass(frozen=True, kw_only=True)
class Snapshot(State):
    """What `Checkpoints.newest` found on disk, its checksums verified."""

    path: Path


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run under `directory`: step-00001000/ and so on.

    A checkpoint is written under a draft name, synced, and renamed once; one that goes is renamed first. Under its
    final name it is whole.
    """

    directory: Path
    keep: int
    keep_every: int | None = None
    passed_over: set[int] = field(default_factory=set, init=False, compare=False)  # steps after the one that was read

    def save(self, state: State) -> Path:
        """Writes the state after `progress.step` steps, and removes what is not to be kept; rank 0 alone calls it.

        Raises CheckpointError where the disk is full or fails; what lay there before is then as it was.
        """
        path = self.write(state)
        self.prune()
        return path

    def write(self, state: State) -> Path:
        """The first half of `save`. Meanwhile it holds WRITING."""
        step = state.progress.step
        final = self.directory / f"step-{step:08d}"
        draft = final.with_name(f".{final.name}.draft")
        with WRITING:
            try:
                if not self.directory.exists():
                    self.directory.mkdir(parents=True)
                    sync_directory(self.directory.parent)
                for stale in self.directory.glob(".step-*"):
                    shutil.rmtree(stale, ignore_errors=True)
                draft.mkdir()
                _write(draft, state)
                for path in newest_first(self.directory):
                    if step_of(path) >= step:  # of what was passed over
                        _remove(path)
                draft.rename(final)
                sync_directory(self.directory)
            except OSError as error:
                shutil.rmtree(draft, ignore_errors=True)  # others need its room
                raise CheckpointError(self._unsaved(step, error)) from error
        self.passed_over.discard(step)
        return final

    def prune(self, spare: int | None = None) -> None:
        """Removes what is not to be kept, as a step to `spare` is; and what was passed over, which is of no use."""
        steps = sorted(self.steps(), reverse=True)
        stay = {*steps[: self.keep], spare} | {step for step in steps if self.keep_every and not step % self.keep_every}
        for path in newest_first(self.directory):
            if step_of(path) not in stay:
                with suppress(OSError):  # the newest is saved; the next call tries again
                    _remove(path)

    def newest(self, warn: Callable[[str], None]) -> Snapshot | None:
        """The newest whole checkpoint; drafts and corrupt ones are named in a warning and passed over.

        Raises CheckpointError when there are checkpoints and none of them is whole, or one is of a later program.
        """
        for draft in drafts(self.directory):
            warn(f"{draft}: a checkpoint that was being written when the run died; ignored")
        candidates = [step_of(path) for path in newest_first(self.directory)]
        for step in candidates:
            try:
                return self.at(step, candidates)
            except DamagedError as error:
                warn(f"{error}; trying the one before it")
        if candidates != [step_of(path) for path in newest_first(self.directory)]:
            return self.newest(warn)  # a run that goes on has removed what was being read
        if candidates:
            raise CheckpointError(
                f"{self.directory}: no checkpoint is whole; move the run directory away to start anew"
            )
        return None

    def steps(self) -> set[int]:
        """The steps of all that have the name of a checkpoint, but of those that were passed over."""
        return set(map(step_of, newest_first(self.directory))) - self.passed_over

    def refuse_later(self, step: int) -> None:
        """Raises CheckpointError where there is a later step than the one that was read: rows follow that one."""
        if later := [other for other in self.steps() if other > step]:
            raise CheckpointError(
                f"{self.directory}: another process has trained this run meanwhile, to step {max(later)}; give the "
                "same command again to go on from there"
            )

    def at(self, step: int, known: Iterable[int]) -> Snapshot:
        """The checkpoint of a step, from which the run goes on: later ones of `known` are passed over.

        Raises DamagedError.
        """
        snapshot = _read(self.directory / f"step-{step:08d}")
        self.passed_over.clear()
        self.passed_over.update(other for other in known if other > step)
        return snapshot

    def _unsaved(self, step: int, error: OSError) -> str:
        newest = max(self.steps(), default=None)
        whole = "no other is there yet" if newest is None else f"step-{newest:08d} is the newest checkpoint"
        reason = f"{error.filename or self.directory}: {error.strerror}: step {step} is not saved, {whole}"
        return f"{reason}; {ADVICE.get(error.errno or 0, 'put that right')}"


class Writer:
    """Saves checkpoints while training goes on, one at a time; rank 0 alone saves, but every rank may ask how it went.

    `required` as in Config. Leaving the context waits for the last save, which is required in any case.
    """

    def __init__(self, save: Callable[[State], object], required: bool, warn: Callable[[str], None]) -> None:
        self._save, self._required, self._warn = save, required, warn
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[object] | None = None

    def save(self, state: State) -> None:
        """Begins to save; lists and tensors of `state` must stay as they are from now on."""
        self.wait()
        self._pending = self._thread.submit(self._save, state)

    def look(self) -> None:
        """Raises CheckpointError, or warns, where a save has failed; one that still goes on is left to itself."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> bool:
        """Like `look`, at the end of the save; whether it has not failed."""
        failure = self._failure()
        if failure and self._required:
            raise CheckpointError(f"{failure}, then give the same command again")
        if failure:
            self._warn(f"{failure}; training goes on")
        return not failure

    def close(self) -> None:
        """Waits for the last save. Raises CheckpointError: what a run ends with must be on the disk."""
        self._required = True
        self.wait()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._thread:
            if error is None:
                self.close()
            elif failure := self._failure():  # the error is what the user must hear
                self._warn(failure)

    def _failure(self) -> str | None:
        pending, self._pending = self._pending, None
        error = pending.exception() if pending else None
        if isinstance(error, CheckpointError):
            return str(error)
        if error:
            raise error
        return None


def averaged(moments: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """The averaged weights among the moments, by name."""
    return {key.removesuffix(EMA): value for key, value in moments.items() if key.endswith(EMA)}


def newest_first(directory: Path) -> list[Path]:
    """Whatever has the name of a checkpoint there."""
    return sorted(filter(is_named, directory.glob("step-*")), key=step_of, reverse=True)


def drafts(directory: Path) -> list[Path]:
    """Checkpoints half written."""
    return sorted(directory.glob(".step-*.draft"))


def is_named(path: Path) -> bool:
    """Whether this is what a checkpoint is called."""
    return re.fullmatch(r"step-\d{8,}", path.name, re.ASCII) is not None


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def sums(path: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint, by name. Raises OSError or ValueError."""
    found = {}
    for line in (path / SUMS).read_text().splitlines():
        match = re.fullmatch(r"([0-9a-f]{64})  (\w[\w.-]*)", line)  # no name that leads out of the directory
        if not match:
            raise ValueError(f"{SUMS}: {line[:100]!r} is not a checksum and the name of a file beside it")
        found[match[2]] = match[1]
    needed = {STATE, WEIGHTS, OPTIMIZER} | ({AVERAGED} if (path / AVERAGED).exists() else set())
    if missing := needed - found.keys():
        raise ValueError(f"{SUMS} has no checksum of {', '.join(sorted(missing))}")
    return found


def state_content(path: Path) -> bytes:
    """The bytes of a checkpoint's STATE, if they are no more than a run can have. Raises OSError or ValueError."""
    if (path / STATE).stat().st_size > LARGEST_STATE:
        raise ValueError(f"{STATE}: more than {LARGEST_STATE:,} bytes")
    return (path / STATE).read_bytes()


def plain(path: Path, content: bytes) -> dict[str, Any]:
    """The `content` of a checkpoint's STATE: the fields of State but for the tensors, of their types.

    Raises ValueError, KeyError or TypeError, and CheckpointError where a later program has written it.
    """
    state = {"format": 1, "scaling": {}} | json.loads(content)  # older than fp16: without scaling
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: of format {str(state['format'])[:20]}, this program reads {FORMAT}: use the one that wrote it"
        )
    for key, kind in {"progress": dict, "meters": list, "scaling": dict, "data": str, "recipe": dict}.items():
        if not isinstance(state[key], kind):
            raise TypeError(f"{key} is not a {kind.__name__}")
    numbers = [number for row in (*state["meters"], state["scaling"]) for number in row.values()]
    if not all(type(number) in (int, float) for number in numbers):
        raise TypeError("meters and scaling are not all numbers")
    if not all(type(count) is int and count >= 0 for count in state["progress"].values()):
        raise TypeError("progress does not count")
    if state["progress"]["step"] != step_of(path):
        raise ValueError(f"it is of step {state['progress']['step']}")
    progress = Progress(step=state["progress"]["step"], seen=state["progress"]["seen"])
    return {"progress": progress} | {key: state[key] for key in ("meters", "scaling", "data", "recipe")}


def _read(path: Path) -> Snapshot:
    from safetensors.torch import load

    try:
        expected = sums(path)
        names = [WEIGHTS, OPTIMIZER, *({AVERAGED} & expected.keys())]
        content = {STATE: state_content(path)} | {name: (path / name).read_bytes() for name in names}
        for name, found in content.items():
            if hashlib.sha256(found).hexdigest() != expected[name]:
                raise DamagedError(f"{path / name}: the checksum differs")
        weights, moments = load(content[WEIGHTS]), load(content[OPTIMIZER])
        if AVERAGED in content:
            moments |= {f"{name}{EMA}": value for name, value in load(content[AVERAGED]).items()}
        return Snapshot(path=path, **plain(path, content[STATE]), weights=weights, moments=moments)
    except NOT_WHOLE as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise CheckpointError(f"{error.filename or path}: {error.strerror}; put that right") from error
        raise DamagedError(f"{path}: not a whole checkpoint ({type(error).__name__}: {error})") from error


def _write(draft: Path, state: State) -> None:
    from vaedist.tensorfile import pieces

    values = {"format": FORMAT, "progress": asdict(state.progress)}
    values |= {key: getattr(state, key) for key in ("meters", "scaling", "data", "recipe")}
    files = {WEIGHTS: state.weights, OPTIMIZER: {k: v for k, v in state.moments.items() if not k.endswith(EMA)}}
    if found := averaged(state.moments):
        files[AVERAGED] = found
    digests = {name: _write_file(draft / name, pieces(tensors)) for name, tensors in files.items()} | {
        STATE: _write_file(draft / STATE, [json.dumps(values, indent=1).encode()]),
    }
    _write_file(draft / SUMS, [f"{digest}  {name}\n".encode() for name, digest in digests.items()])
    sync_directory(draft)


def _write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Writes a file to the disk; its SHA-256."""
    digest = hashlib.sha256()
    try:
        with path.open("wb") as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = str(path)  # the system does not say which
        raise
    return digest.hexdigest()


def _remove(path: Path) -> None:
    """What somebody still reads over a network may stay for now; the next save tries again."""
    gone = path.with_name(f".{path.name}.removed")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


if __name__ == "__main__":
    import signal

    from vaedist.checkpoint_commands import main

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word, like any other command
    sys.exit(main())
