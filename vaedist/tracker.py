"""Writes down what a run measures: metrics.jsonl and pictures are the truth, W&B is a view of them."""

import fcntl
import json
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from shards.files import replacing
from shards.remote.fetch import is_remote, set_name
from vaedist import rows
from vaedist.config import ConfigError, bounded, leaves
from vaedist.pictures import Picture, write_pictures
from vaedist.wandb_view import About, Job, Wandb, has_credentials, open_wandb
from vaedist.words import nearest

Mode = Literal["auto", "online", "offline", "off"]


@dataclass(frozen=True, kw_only=True)
class Config:
    every: int = bounded(100, at_least=1, at_most=100_000)  # steps, of which a checkpoint carries every one along
    wandb: Mode = "auto"  # online where a credential is found, else offline; WANDB_MODE decides if it is set
    project: str = "vaedist"
    entity: str | None = None
    group: str | None = None  # of the runs that are compared; null: the run's name without its seed
    tags: tuple[str, ...] = ()  # beside the objective and the data set
    notes: str | None = None
    artifacts: bool = False  # the last checkpoint goes to W&B, as made from the data set, of which it gets the address


class Tracker:
    """Keeps rows and pictures on disk and shows them on W&B; without either it is the others' tracker."""

    def __init__(self, files: "Files | None" = None, view: Wandb | None = None) -> None:
        self._files, self._view = files, view

    def log(self, row: Mapping[str, float]) -> None:
        """One row of numbers; `step` and `seen` are among them."""
        if self._files:
            self._files.log(row)
        if self._view:
            self._view.log(row)

    def pictures(self, pictures: Mapping[str, Picture], step: int, seen: int) -> None:
        """Pictures by name, uint8 [H, W, 3], or [frames, H, W, 3] of an animation; the row of the step comes later."""
        if self._files and pictures:
            write_pictures(self._files.pictures(step), pictures)
            if self._view:
                self._view.pictures(self._files.pictures(step), step, seen)

    def complete(self, step: int) -> None:
        """The run has ended with the checkpoint of this step."""
        if self._view:
            self._view.checkpoint(step)

    def preempted(self) -> None:
        """The run ends now and will go on."""
        if self._view:
            self._view.preempted()

    def close(self, failed: bool = False) -> None:
        files, view, self._files, self._view = self._files, self._view, None, None
        if files:
            files.close(failed)
        if view:
            view.close(failed)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(failed=error is not None)


def open_tracker(
    track: Config,
    *,
    run: Path,
    recipe: Mapping[str, Any],
    environment: Mapping[str, Any],
    done: int,
    announce: Callable[[str], None],
    claimed: Callable[[], None] = lambda: None,
) -> Tracker:
    """The tracker of the run in directory `run` after `done` steps, for the one process that writes.

    `claimed` is called when no other process writes there any more, and nothing is changed yet; it may raise. Raises
    ConfigError when the metrics.jsonl that is there is not one, or another process writes in this directory.
    """
    _mode(track)  # what is wrong with it comes first
    with ExitStack() as opened:
        files = Files(run, done, claimed)
        opened.callback(files.close, failed=True)
        view = open_view(track, run, "train", recipe, environment, announce)
        if view:
            view.replay(files.rows(), files.pictures)
        opened.pop_all()
    return Tracker(files, view)


def open_view(
    track: Config,
    place: Path,
    job: Job,
    recipe: Mapping[str, Any],
    environment: Mapping[str, Any],
    announce: Callable[[str], None],
) -> Wandb | None:
    """What is at `place`, a run's directory or one in it, on W&B; None where that is not asked for or not possible."""
    mode = _mode(track)
    if mode == "off":
        return None
    run, shards = Path(recipe["run"]), str(recipe["data"]["shards"])
    about = About(
        place=place,
        job=job,
        name=run.name if place == run else f"{run.name} {place.name}",
        group=track.group or ",".join(word for word in run.name.split(",") if not word.startswith("seed=")),
        project=track.project,
        entity=track.entity,
        tags=(*track.tags, recipe["objective"]["name"], set_name(shards)),
        notes=track.notes,
        config=leaves({**recipe, "environment": environment}),
        data=(shards if is_remote(shards) else str(Path(shards).absolute()), environment["data"]),
        artifacts=track.artifacts,
    )
    return open_wandb(mode, about, announce)


class Files:
    """metrics.jsonl, one object a line, on the disk when `log` returns; pictures/step-00001000/NAME.png."""

    def __init__(self, run: Path, done: int, claimed: Callable[[], None]) -> None:
        self._run = run
        run.mkdir(parents=True, exist_ok=True)
        path = run / "metrics.jsonl"
        with ExitStack() as files:
            files.enter_context(claim(run))
            claimed()
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

    def rows(self) -> list[dict[str, float]]:
        """All that are kept."""
        return rows.read(self._run / "metrics.jsonl")

    def pictures(self, step: int) -> Path:
        """The directory for the pictures of a step."""
        return self._run / "pictures" / f"step-{step:08d}"

    def close(self, failed: bool) -> None:
        with suppress(OSError) if failed else nullcontext():  # a full disk would refuse the same row once more
            self._open.close()


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
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{run}: is a file; say run=ANOTHER")
    if run.exists():
        claim(run).close()


def keep_rows(path: Path, done: int) -> None:
    """Drops what a run wrote after the checkpoint that it resumes from: rows of later steps, and a half-written one."""
    numbered = enumerate(rows.lines(path), 1)
    kept = [line for number, line in numbered if rows.parsed(line, f"{path}:{number}")["step"] <= done]
    with replacing(path) as file:
        file.writelines(kept)


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
    return "online" if has_credentials() else "offline, no credentials; `wandb login` stores them"
