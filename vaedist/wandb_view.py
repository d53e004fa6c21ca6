"""A run on W&B: what metrics.jsonl and the pictures say, online or in a file that `wandb sync` uploads."""

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shards.files import replacing
from shards.remote.fetch import set_name
from vaedist.pictures import FORMATS

PATIENCE = 30.0  # seconds for the server to answer at the start of a run
LAST, UPLOAD = 60.0, 600.0  # seconds for it to take the rest at the end, and a checkpoint
SUMMARIZED = "eval/", "train/"  # with minimum, maximum and last value
LONGEST = 64, 128  # characters that W&B allows a tag, and a name or group
Attempt = Literal["online", "offline"]
Job = Literal["train", "eval"]
_open: list[Any] = []  # the runs that W&B's process still writes


@dataclass(frozen=True, kw_only=True)
class About:
    """What W&B shows of a run beside its rows; its directory `place` is what the rows are read back from."""

    place: Path
    job: Job
    name: str
    group: str
    project: str
    entity: str | None
    tags: tuple[str, ...]
    notes: str | None
    config: Mapping[str, Any]  # flat
    data: tuple[str, str]  # the address of the data set, and its digest
    artifacts: bool

    @property
    def wandb(self) -> Path:
        return self.place / "wandb"


class Wandb:
    """A view that training neither waits for nor fails with: its first failure is the last that is heard of it.

    A row's step is W&B's own: what W&B has up to step `has` is not sent again.
    """

    def __init__(self, run: Any, about: About, has: int, announce: Callable[[str], None]) -> None:
        self._run, self._about, self._has, self._announce = run, about, has, announce
        self._preempted = False
        self._summary, self._defined = dict[str, dict[str, float]](), set[str]()

    def log(self, row: Mapping[str, float]) -> None:
        step = int(row["step"])
        summary = self._summarized(row)
        if step <= self._has:
            return
        from wandb import Histogram

        latents = [value for key, value in row.items() if re.fullmatch(r"latent/kl_\d+", key)]
        more = {"latent/kl_histogram": Histogram(latents)} if latents else {}
        self._attempt(self._define(summary.keys()))
        self._attempt(lambda run: run.log(dict(row) | more, step=step, commit=True))
        self._attempt(lambda run: run.summary.update(summary))

    def _define(self, names: Iterable[str]) -> Callable[[Any], None]:
        """Takes the summaries from W&B, one by one: of two patterns that fit a name it takes either."""
        new = set(names) - self._defined
        self._defined |= new

        def define(run: Any) -> None:
            for name in sorted(new):
                run.define_metric(name, step_metric="seen", summary="none")

        return define

    def _summarized(self, row: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """The extremes of a row's numbers over all rows so far; W&B's own would begin anew with every process."""
        for name, value in row.items():
            if name.startswith(SUMMARIZED):
                before = self._summary.get(name, {"min": value, "max": value})
                least, greatest = min(before["min"], value), max(before["max"], value)
                self._summary[name] = {"min": least, "max": greatest, "last": value}
        return {name: self._summary[name] for name in row.keys() & self._summary.keys()}

    def pictures(self, directory: Path, step: int, seen: int) -> None:
        """The pictures of a step, which its row follows."""
        if step <= self._has:
            return
        from wandb import Image, Video

        def media(path: Path) -> Any:
            return Video(str(path), format="gif") if path.suffix == ".gif" else Image(str(path))

        found = {f"pictures/{path.stem}": path for path in sorted(directory.iterdir()) if path.suffix[1:] in FORMATS}
        self._attempt(
            lambda run: run.log(
                {"step": step, "seen": seen} | {name: media(path) for name, path in found.items()},
                step=step,
                commit=False,
            )
        )

    def replay(self, rows: list[dict[str, float]], pictures: Callable[[int], Path]) -> None:
        """Sends what W&B lacks of the rows so far: a process that was killed took some along."""
        for row in rows:
            step, seen = int(row["step"]), int(row["seen"])
            if (directory := pictures(step)).exists():
                self.pictures(directory, step, seen)
            self.log(row)

    def checkpoint(self, step: int) -> None:
        """The checkpoint of a step as an artifact made from that of the data set, if they are asked for."""
        if self._about.artifacts:
            path = self._about.place / "checkpoints" / f"step-{step:08d}"
            self._attempt(lambda run: self._upload(run, path))

    def _upload(self, run: Any, path: Path) -> None:
        from wandb import Artifact

        where, digest = self._about.data
        data = Artifact(_word(set_name(where)), "dataset", metadata={"location": where, "digest": digest})
        with data.new_file("location.json") as file:  # W&B's own references need a client for every kind of store
            json.dump(data.metadata, file)
        run._log_artifact(data, use_after_commit=True)  # `use_artifact` waits for the server for ever, and not offline
        checkpoint = Artifact(f"checkpoint-{run.id}", "model", metadata={"data": digest})
        checkpoint.add_dir(str(path), skip_cache=True, policy="immutable")
        run.log_artifact(checkpoint, aliases=["latest", path.name])

    def preempted(self) -> None:
        """The run will go on in another job."""
        self._preempted = True
        self._attempt(lambda run: run.mark_preempting())

    def close(self, failed: bool) -> None:
        self._attempt(lambda run: run.finish(exit_code=int(failed or self._preempted)))
        self._leave()

    def _leave(self) -> None:
        if self._run in _open:
            _open.remove(self._run)
        self._run = None
        _end_process()  # which still writes to a run's file when finish returns

    def _attempt(self, act: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:  # not StoppedError, see below
            if not isinstance(error, _failures()):
                raise
            self._announce(f"W&B: lost ({_reason(error)}); the run goes on, metrics.jsonl has everything")
            self._leave()


def open_wandb(mode: str, about: About, announce: Callable[[str], None]) -> Wandb | None:
    """The run on W&B, the same one after a resume; one line says where it is, or why there is none."""
    why = "as asked"
    attempts: tuple[Attempt, ...] = ("offline",) if mode == "offline" else ("online", "offline")
    for attempt in attempts:
        try:
            run = _start(attempt, about)
            has = run.starting_step - 1 if attempt == "online" else _last_step_sent(about, run.id)
        except Exception as error:  # not StoppedError, which may come while W&B is half imported
            if not isinstance(error, _failures(ValueError)):  # of settings: WANDB_BASE_URL may be no address
                raise
            why = _reason(error)
            _end_process()  # it would not let go of the run's id
            continue
        for path in about.wandb.glob(f"offline-run-*-{run.id}"):
            # All of it is sent again, or the server has it: uploaded later it would be there twice
            if path != Path(run.dir).parent and not list(path.glob("*.synced")):
                shutil.rmtree(path, ignore_errors=True)
        where = run.url if attempt == "online" else f"{why}; upload: wandb sync {_quoted(about)}/offline-run-*"
        announce(f"W&B: {attempt}, {where}")
        _open.append(run)
        return Wandb(run, about, has, announce)
    announce(f"W&B: off, {why}")
    return None


def has_credentials() -> bool:
    import wandb  # takes seconds

    try:
        wandb.setup(wandb.Settings(silent=True))
        return wandb.login(prompt=False, verify=False)
    except ValueError:  # of settings
        return False
    finally:
        _end_process()


def _start(mode: Attempt, about: About) -> Any:
    import wandb  # takes seconds

    wandb.setup(wandb.Settings(silent=True))
    if mode == "online" and not wandb.login(prompt=False, verify=False):  # init would ask, and wait for ever
        raise wandb.errors.UsageError("no credentials; `wandb login` stores them")
    tag, name = LONGEST
    run = wandb.init(
        mode=mode,
        dir=about.place,
        id=_identity(about) if about.job == "train" else None,  # every evaluation is a run of its own
        resume="allow" if mode == "online" else None,
        name=about.name[-name:],
        project=about.project,
        entity=about.entity,
        group=about.group[:name],
        job_type=about.job,
        tags=[word[:tag] for word in dict.fromkeys(about.tags)],
        notes=about.notes,
        config=dict(about.config),
        settings=wandb.Settings(
            reinit="create_new",  # beside those of other replicas
            console="off",
            silent=True,
            init_timeout=PATIENCE,
            finish_timeout=UPLOAD if about.artifacts else LAST,
            finish_timeout_raises=True,
        ),
    )
    run.define_metric("seen")
    run.define_metric("*", step_metric="seen")
    return run


def _last_step_sent(about: About, id: str) -> int:
    """The last step in the files of earlier segments that were online or are synced, -1 if there is none.

    What of an online one has not arrived is sent when the run is online again.
    """
    segments = [*about.wandb.glob(f"run-*-{id}/*.wandb"), *about.wandb.glob(f"offline-run-*-{id}/*.synced")]
    for path in sorted(segments, key=lambda path: path.parent.name.rpartition("run-")[2], reverse=True):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path).removesuffix(".synced")]
        lines = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
        records = [json.loads(line) for line in lines.splitlines() if b'"history"' in line]
        if steps := [record["history"]["step"]["num"] for record in records if record["type"] == "history"]:
            return max(steps)
    return -1


def _failures(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What W&B raises when its server, its own process or the disk fails; these have no common base."""
    from wandb.errors import Error
    from wandb.sdk.lib.service.service_token import WandbServiceConnectionError
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError
    from wandb.sdk.mailbox.mailbox_handle import ServerResponseError

    mailbox = (HandleAbandonedError, MailboxClosedError, ServerResponseError)
    return (Error, OSError, subprocess.CalledProcessError, WandbServiceConnectionError, *mailbox, *more)


def _end_process() -> None:
    """Waits for W&B's process to end, unless other runs need it.

    Left to the interpreter's exit, one that died would leave a traceback.
    """
    import wandb

    if _open:
        return
    with suppress(*_failures()):
        wandb.teardown()


def _identity(about: About) -> str:
    """The run's id, for ever; `wandb agent` has chosen one for the run that it starts."""
    path = about.wandb / "id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write((os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)).encode())
    return path.read_text()


def _quoted(about: About) -> str:
    return shlex.quote(str(about.wandb))


def _word(name: str) -> str:
    """A name that W&B allows an artifact."""
    return re.sub(r"[^\w.-]+", "-", name) or "data"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
