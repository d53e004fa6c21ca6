"""Runs of W&B, read as if they were directories here."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vaedist.compare.runs import Picture, Run, canonical, curves
from vaedist.config import ConfigError
from vaedist.pictures import FORMATS

PATIENCE = 30  # seconds for the server to answer
PICTURES = "pictures/"  # before the name of one in a row


@contextmanager
def server() -> Iterator[Any]:
    """W&B's public interface, usable within the context. Raises ConfigError where there is none."""
    import wandb  # takes seconds

    wandb.setup(wandb.Settings(silent=True))
    try:
        with said():
            if not wandb.login(prompt=False, verify=False):  # Api would ask, and wait for ever
                raise ConfigError("W&B: no credentials; `wandb login` stores them")
            api = wandb.Api(timeout=PATIENCE)
        yield api
    finally:
        wandb.teardown()


@contextmanager
def said() -> Iterator[None]:
    """Turns what a call of W&B raises into a ConfigError of one line."""
    from requests import RequestException
    from wandb import Error
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        yield
    except (Error, RequestException, WandbApiFailedError, OSError, ValueError) as error:
        raise ConfigError(f"W&B: {error}") from error


def is_name(word: str) -> bool:
    """Whether a word is of the form entity/project/RUN."""
    parts = word.split("/", 2)
    return len(parts) == 3 and all(parts) and not word.startswith((".", "~"))


def find(word: str, api: Any) -> list[Run]:
    """The runs that W&B has for entity/project/RUN, where RUN is an id, a name or a group. Raises ConfigError.

    An evaluation, which W&B has as a run of its own, counts as rows of the run that it looked at, if that is found too.
    """
    entity, project, name = word.split("/", 2)
    filters = {"$or": [{key: name} for key in ("name", "display_name", "group")]}
    with said():
        found = sorted(api.runs(f"{entity}/{project}", filters=filters), key=lambda run: run.job_type == "eval")
        runs: dict[str, Run] = {}
        for one in found:
            run = _read(one)
            place = run.recipe["run"]
            same = place in runs and one.job_type == "eval"
            runs[place if same or place not in runs else run.path] = _joined(runs[place], run) if same else run
    if not found:
        raise ConfigError(f"{word}: is neither a directory nor a run or group of W&B")
    return list(runs.values())


def _read(run: Any) -> Run:
    name = "/".join([*run.path[:2], run.name])
    recipe = canonical(run.config)
    if "run" not in recipe or not recipe.get("train.steps", "").isdecimal():
        raise ConfigError(f"{name}: is no run of vaedist: its config has no train.steps")
    rows = [row for row in run.scan_history(use_cache=False) if {"step", "seen"} <= row.keys()]
    return Run(
        name=name,
        recipe={key: value for key, value in recipe.items() if not key.startswith("environment.")},
        data=recipe.get("environment.data") or recipe.get("data.shards", ""),
        step=max((row["step"] for row in rows), default=0),
        curves=curves(rows),
        pictures=_pictures(run, rows),
        path="/".join(run.path),
    )


def _joined(run: Run, later: Run) -> Run:
    """The run with the numbers and pictures of a later look at it."""
    rows = [
        {"step": point.step, "seen": point.seen, name: point.value}
        for one in (run, later)
        for name, curve in one.curves.items()
        for point in curve
    ]
    names = run.pictures.keys() | later.pictures.keys()
    pictures = {name: run.pictures.get(name, {}) | later.pictures.get(name, {}) for name in names}
    return replace(run, curves=curves(rows), pictures=pictures)


def _pictures(run: Any, rows: list[dict[str, Any]]) -> dict[str, dict[int, Picture]]:
    uploaded = {file.name: file for file in run.files(per_page=1000)}
    found: dict[str, dict[int, Picture]] = {}
    for row in rows:
        for key, value in row.items():
            file = uploaded.get(value["path"]) if key.startswith(PICTURES) and isinstance(value, dict) else None
            if file and (kind := file.name.rpartition(".")[2]) in FORMATS:
                found.setdefault(key.removeprefix(PICTURES), {})[row["step"]] = Picture(kind, partial(_download, file))
    return found


def _download(file: Any) -> bytes:
    with said(), tempfile.TemporaryDirectory() as directory:
        file.download(root=directory).close()
        return (Path(directory) / file.name).read_bytes()
