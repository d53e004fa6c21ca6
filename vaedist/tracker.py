"""Writes down what a run measures: metrics.jsonl and pictures are the truth, W&B is a view of them."""

import fcntl
import io
import json
import os
import platform
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Protocol

import numpy as np
from PIL import Image

from shards.files import replacing
from vaedist.config import ConfigError, bounded
from vaedist.words import nearest

Mode = Literal["auto", "online", "offline", "off"]
PATIENCE = 30.0  # seconds for the server to answer at the start of a run
FRAME = 120  # milliseconds of an animation's frame
Attempt = Literal["online", "offline"]


@dataclass(frozen=True, kw_only=True)
class Config:
    every: int = bounded(100, at_least=1)  # steps
    wandb: Mode = "auto"  # online where a credential is found, else offline; WANDB_MODE decides if it is set
    project: str = "vaedist"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


class Sink(Protocol):
    """A place where rows and pictures go."""

    def log(self, row: Mapping[str, float]) -> None: ...

    def pictures(self, pictures: Mapping[str, np.ndarray], step: int, seen: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class Tracker:
    """Hands everything to its sinks in turn; without any it is the tracker of a process that writes nothing."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self._sinks = sinks

    def log(self, row: Mapping[str, float]) -> None:
        """One row of numbers; `step` and `seen` are among them."""
        for sink in self._sinks:
            sink.log(row)

    def pictures(self, pictures: Mapping[str, np.ndarray], step: int, seen: int) -> None:
        """Pictures by name, uint8 [H, W, 3], or [frames, H, W, 3] of an animation."""
        for sink in self._sinks:
            sink.pictures(pictures, step, seen)

    def close(self, failed: bool = False) -> None:
        for sink in self._sinks:
            sink.close(failed)
        self._sinks = ()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(failed=error is not None)


def open_tracker(
    track: Config, *, run: Path, config: dict[str, Any], done: int, announce: Callable[[str], None]
) -> Tracker:
    """The tracker of the run in directory `run` after `done` steps, for the one process that writes.

    `config` is what W&B shows as the run's. Raises ConfigError when the metrics.jsonl that is there is not one, or
    another process writes in this directory.
    """
    mode = _mode(track)
    files = Files(run, done)
    view = None if mode == "off" else open_wandb(mode, track, run, config, announce)
    return Tracker([files] if view is None else [files, view])


class Files:
    """metrics.jsonl, one object a line, on the disk when `log` returns; pictures/step-00001000/NAME.png."""

    def __init__(self, run: Path, done: int) -> None:
        self._directory = run / "pictures"
        run.mkdir(parents=True, exist_ok=True)
        path = run / "metrics.jsonl"
        with ExitStack() as files:
            files.enter_context(claim(run))
            if path.exists():
                keep_rows(path, done)
            self._file = files.enter_context(path.open("ab"))
            self._open = files.pop_all()

    def log(self, row: Mapping[str, float]) -> None:
        try:
            self._file.write(f"{json.dumps(dict(row), allow_nan=False)}\n".encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            error.filename = self._file.name  # the system does not say which
            raise

    def pictures(self, pictures: Mapping[str, np.ndarray], step: int, seen: int) -> None:
        write_pictures(self._directory / f"step-{step:08d}", pictures)

    def close(self, failed: bool) -> None:
        with suppress(OSError) if failed else nullcontext():  # a full disk would refuse the same row once more
            self._open.close()


def write_pictures(directory: Path, pictures: Mapping[str, np.ndarray]) -> None:
    """NAME.png for each of them, uint8 [H, W, 3], or NAME.gif, uint8 [frames, H, W, 3]."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, pixels in pictures.items():
        with replacing(directory / f"{name}.{kind(pixels)}") as file:
            file.write(encoded(pixels))


def kind(pixels: np.ndarray) -> str:
    """The format that a picture is kept in."""
    return "png" if pixels.ndim == 3 else "gif"


def encoded(pixels: np.ndarray) -> bytes:
    """A picture's file."""
    stream = io.BytesIO()
    if kind(pixels) == "png":
        Image.fromarray(pixels).save(stream, format="PNG")
    else:
        # one palette for all frames: with one of its own each would flicker, and take ten times as long
        palette = Image.fromarray(pixels.reshape(-1, *pixels.shape[2:])).quantize(method=Image.Quantize.FASTOCTREE)
        frames = (Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in pixels)
        first, *others = frames
        first.save(stream, format="GIF", save_all=True, append_images=others, duration=FRAME, loop=0)
    return stream.getvalue()


def claim(run: Path) -> IO[bytes]:
    """The run directory for this process alone until the file is closed or the process dies, however it dies."""
    file = (run / ".lock").open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        holder = (run / ".lock").read_text().strip() or "another process"
        raise ConfigError(f"{run}: {holder} is training this run; wait for it, or say run=ANOTHER") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
    file.flush()
    return file


def refuse_second(run: Path) -> None:
    """Raises the error of `claim` early: who opens the tracker claims the directory until the end."""
    if run.exists():
        claim(run).close()


def keep_rows(path: Path, done: int) -> None:
    """Drops what a run wrote after the checkpoint that it resumes from: rows of later steps, and a half-written one."""
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= done:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path}:{number}: not a row with a step; move the file away") from None
    with replacing(path) as file:
        file.writelines(kept)


class Wandb:
    """A view that training neither waits for nor fails with: its first failure is the last that is heard of it."""

    def __init__(self, run: Any, announce: Callable[[str], None]) -> None:
        self._run = run
        self._announce = announce

    def log(self, row: Mapping[str, float]) -> None:
        self._attempt(lambda run: run.log(dict(row)))  # without step=: W&B would drop rows of a step it has passed

    def pictures(self, pictures: Mapping[str, np.ndarray], step: int, seen: int) -> None:
        from wandb import Image, Video

        def media(pixels: np.ndarray) -> Any:
            return Image(pixels) if kind(pixels) == "png" else Video(io.BytesIO(encoded(pixels)), format="gif")

        self._attempt(lambda run: run.log(
            {"step": step, "seen": seen} | {f"pictures/{name}": media(pixels) for name, pixels in pictures.items()}
        ))  # fmt: skip

    def close(self, failed: bool) -> None:
        self._attempt(lambda run: run.finish(exit_code=int(failed)))
        _end_process()  # which still writes to the run's file when finish returns

    def _attempt(self, act: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except _failures() as error:
            self._run = None
            self._announce(f"W&B: lost ({_reason(error)}); the run goes on, metrics.jsonl has everything")
            _end_process()


def open_wandb(
    mode: str, track: Config, run: Path, config: dict[str, Any], announce: Callable[[str], None]
) -> Wandb | None:
    """The run on W&B, the same one after a resume; one line says where it is, or why there is none."""
    why = "as asked"
    attempts: tuple[Attempt, ...] = ("offline",) if mode == "offline" else ("online", "offline")
    for attempt in attempts:
        try:
            view = _start(attempt, track, run, config)
        except _failures() as error:
            why = _reason(error)
            _end_process()  # it would not let go of the run's id
            continue
        where = view.url if attempt == "online" else f"{why}; upload: wandb sync {_quoted(run)}/offline-run-*"
        announce(f"W&B: {attempt}, {where}")
        return Wandb(view, announce)
    announce(f"W&B: off, {why}")
    return None


def _mode(track: Config) -> str:
    asked = os.environ.get("WANDB_MODE")
    if track.wandb == "off" or asked is None:
        return track.wandb
    modes = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}
    if asked not in modes:
        raise ConfigError(f"environment: WANDB_MODE={asked} is no choice; {nearest(asked, modes)}")
    return modes[asked]


def foreseen(track: Config) -> str:
    """Where the rows of a run will go beside metrics.jsonl, as far as can be known before it."""
    mode = _mode(track)
    if mode in ("offline", "off"):
        return mode
    import wandb  # takes seconds

    wandb.setup(wandb.Settings(silent=True))
    known = wandb.login(prompt=False, verify=False)
    _end_process()
    return "online" if known else "offline, no credentials; `wandb login` stores them"


def _start(mode: Attempt, track: Config, run: Path, config: dict[str, Any]) -> Any:
    import wandb  # takes seconds

    wandb.setup(wandb.Settings(silent=True))
    if mode == "online" and not wandb.login(prompt=False, verify=False):  # init would ask, and wait for ever
        raise wandb.errors.UsageError("no credentials; `wandb login` stores them")
    view = wandb.init(
        mode=mode,
        dir=run,
        id=_identity(run / "wandb" / "id"),
        resume="allow" if mode == "online" else None,
        name=run.name,
        project=track.project,
        entity=track.entity,
        group=track.group,
        tags=track.tags,
        config=config,
        settings=wandb.Settings(
            console="off", silent=True, init_timeout=PATIENCE, finish_timeout=60, finish_timeout_raises=True
        ),
    )
    view.define_metric("seen")
    view.define_metric("*", step_metric="seen")
    return view


def _failures() -> tuple[type[Exception], ...]:
    """What W&B raises when its server, its own process or the disk fails; these have no common base."""
    from wandb.errors import Error
    from wandb.sdk.lib.service.service_token import WandbServiceConnectionError
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError
    from wandb.sdk.mailbox.mailbox_handle import ServerResponseError

    mailbox = (HandleAbandonedError, MailboxClosedError, ServerResponseError)
    return (Error, OSError, WandbServiceConnectionError, *mailbox)


def _end_process() -> None:
    """Waits for W&B's process to end; left to the interpreter's exit, one that died would leave a traceback."""
    import wandb

    with suppress(*_failures()):
        wandb.teardown()


def _identity(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(secrets.token_hex(4).encode())
    return path.read_text()


def _quoted(run: Path) -> str:
    return shlex.quote(str(run / "wandb"))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
