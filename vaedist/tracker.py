"""Writes down what a run measures: metrics.jsonl and pictures are the truth, W&B is a view of them."""

import json
import math
import os
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from shards.manifest import replacing
from vaedist.config import ConfigError, bounded

Mode = Literal["auto", "online", "offline", "off"]


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
        """Pictures by name, uint8 [H, W, 3]."""
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
    track: Config, *, run: Path, config: dict[str, Any], main: bool, done: int, announce: Callable[[str], None]
) -> Tracker:
    """The tracker of the run in directory `run` after `done` steps; that of the `main` process alone writes.

    `config` is what W&B shows as the run's. Raises ConfigError when the metrics.jsonl that is there is not one.
    """
    if not main:
        return Tracker()
    files, view = Files(run, done), open_wandb(track, run, config, announce)
    return Tracker([files] if view is None else [files, view])


class Files:
    """metrics.jsonl, one object a line, on the disk when `log` returns; pictures/step-00001000/NAME.png."""

    def __init__(self, run: Path, done: int) -> None:
        self._directory = run / "pictures"
        run.mkdir(parents=True, exist_ok=True)
        path = run / "metrics.jsonl"
        if path.exists():
            keep_rows(path, done)
        self._file = path.open("ab", buffering=0)

    def log(self, row: Mapping[str, float]) -> None:
        numbers = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON knows no NaN
        self._file.write(f"{json.dumps(numbers, allow_nan=False)}\n".encode())
        os.fsync(self._file.fileno())

    def pictures(self, pictures: Mapping[str, np.ndarray], step: int, seen: int) -> None:
        directory = self._directory / f"step-{step:08d}"
        directory.mkdir(parents=True, exist_ok=True)
        for name, pixels in pictures.items():
            with replacing(directory / f"{name}.png") as file:
                Image.fromarray(pixels).save(file, format="PNG")

    def close(self, failed: bool) -> None:
        self._file.close()


def keep_rows(path: Path, done: int) -> None:
    """Drops what a run wrote after the checkpoint that it resumes from: rows of later steps, and a half-written one."""
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path}:{number}: not a row with a step; move the file away") from None
        if step <= done:
            kept.append(line)
    with replacing(path) as file:
        file.writelines(kept)


class Wandb:
    """A view that training neither waits for nor fails with: its first failure is the last that is heard of it."""

    def __init__(self, run: Any, failures: tuple[type[Exception], ...], announce: Callable[[str], None]) -> None:
        self._run = run
        self._failures = failures
        self._announce = announce

    def log(self, row: Mapping[str, float]) -> None:
        self._attempt(lambda run: run.log(dict(row)))  # without step=: W&B would drop the rows of a resumed run

    def pictures(self, pictures: Mapping[str, np.ndarray], step: int, seen: int) -> None:
        from wandb import Image

        images = {f"pictures/{name}": Image(pixels) for name, pixels in pictures.items()}
        self._attempt(lambda run: run.log({"step": step, "seen": seen, **images}))

    def close(self, failed: bool) -> None:
        self._attempt(lambda run: run.finish(exit_code=int(failed)))

    def _attempt(self, act: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except self._failures as error:
            self._run = None
            self._announce(f"W&B: lost ({_line(error)}); the run goes on without it, metrics.jsonl has everything")


def open_wandb(track: Config, run: Path, config: dict[str, Any], announce: Callable[[str], None]) -> Wandb | None:
    """The run on W&B, the same one each time; None, and a line that says why, where there cannot be one."""
    mode = _mode(track)
    if mode == "off":
        return None
    import wandb  # takes seconds

    failures = (wandb.errors.Error, OSError)
    wandb.setup(wandb.Settings(silent=True))
    why = "as asked"
    for attempt in ("online", "offline") if mode != "offline" else ("offline",):
        try:
            # init itself would ask for the key on a terminal, and wait for ever
            if attempt == "online" and not wandb.login(prompt=False, verify=False):
                why = "no credentials; `wandb login` stores them"
                continue
            view = wandb.init(
                mode=attempt,
                dir=run,
                id=_identity(run),
                resume="allow" if attempt == "online" else None,
                name=run.name,
                project=track.project,
                entity=track.entity,
                group=track.group,
                tags=track.tags,
                config=config,
                settings=wandb.Settings(
                    console="off", silent=True, init_timeout=30, finish_timeout=60, finish_timeout_raises=True
                ),
            )
            view.define_metric("seen")
            view.define_metric("*", step_metric="seen")
        except failures as error:
            why = _line(error)
            continue
        where = view.url if attempt == "online" else f"{why}; to upload: wandb sync {_quoted(run)}/offline-run-*"
        announce(f"W&B: {attempt}, {where}")
        return Wandb(view, failures, announce)
    announce(f"W&B: off, {why}")
    return None


def _mode(track: Config) -> str:
    asked = os.environ.get("WANDB_MODE")
    if track.wandb == "off" or asked is None:
        return track.wandb
    modes = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "off"}
    if asked not in modes:
        raise ConfigError(f"environment: WANDB_MODE={asked} is no choice; choose from {', '.join(modes)}")
    return modes[asked]


def _identity(run: Path) -> str:
    path = run / "wandb" / "id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(secrets.token_hex(4).encode())
    return path.read_text()


def _quoted(run: Path) -> str:
    return shlex.quote(str(run / "wandb"))


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
