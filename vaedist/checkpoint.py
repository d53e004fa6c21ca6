"""The state of a run as directories of safetensors and JSON that say nothing of processes, devices or precision."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from shards.files import replacing, sync_directory
from vaedist.config import bounded

STATE, WEIGHTS, OPTIMIZER = "state.json", "weights.safetensors", "optimizer.safetensors"
SUMS = "SHA256SUMS"  # of the other files, for `sha256sum --check`


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one line for the user."""


@dataclass
class Progress:
    """The one clock of a run: optimiser steps made, or in fp16 skipped, and images consumed by all ranks together."""

    step: int = 0
    seen: int = 0


@dataclass(frozen=True, kw_only=True)
class Config:
    every: int = bounded(1000, at_least=1)  # steps; the last step is always saved
    keep: int = bounded(3, at_least=1)  # the newest so many


@dataclass(frozen=True, kw_only=True)
class State:
    """All of a run between two steps, of all ranks together; its tensors lie in memory of their own, on the CPU."""

    progress: Progress
    meters: list[dict[str, float]]
    scaling: dict[str, float]  # of the loss in fp16, else nothing
    data: str
    recipe: dict[str, Any]
    weights: dict[str, Tensor]  # and buffers, by name
    moments: dict[str, Tensor]  # of the optimiser, by PARAMETER/NAME


@dataclass(frozen=True, kw_only=True)
class Snapshot(State):
    """What `Checkpoints.newest` found on disk, its checksums verified."""

    path: Path


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a run under `directory`: step-00001000/ and so on.

    A checkpoint is written under a draft name, synced, and renamed once: under its final name it is whole.
    """

    directory: Path
    keep: int

    def save(self, state: State) -> Path:
        """Writes the state after `progress.step` steps; rank 0 alone calls it."""
        plain = {
            "progress": asdict(state.progress), "meters": state.meters, "scaling": state.scaling,
            "data": state.data, "recipe": state.recipe,
        }  # fmt: skip
        files = {
            WEIGHTS: save(state.weights),
            OPTIMIZER: save(state.moments),
            STATE: json.dumps(plain, indent=1).encode(),
        }
        sums = "".join(f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items())
        files[SUMS] = sums.encode()

        for stale in self.directory.glob(".step-*.draft"):
            shutil.rmtree(stale)
        final = self.directory / f"step-{state.progress.step:08d}"
        draft = self.directory / f".{final.name}.draft"
        draft.mkdir(parents=True)
        for name, content in files.items():
            with replacing(draft / name) as file:
                file.write(content)
        older = []
        for path in self._newest_first():
            if path < final:
                older.append(path)
            else:  # a corrupt one, passed over when the run was resumed before it
                shutil.rmtree(path)
        draft.rename(final)
        sync_directory(self.directory)
        for path in older[self.keep - 1 :]:
            shutil.rmtree(path)
        return final

    def newest(self, warn: Callable[[str], None]) -> Snapshot | None:
        """The newest whole checkpoint; drafts and corrupt ones are named in a warning and passed over.

        Raises CheckpointError when there are checkpoints and none of them is whole.
        """
        for draft in self.directory.glob(".step-*.draft"):
            warn(f"{draft}: a checkpoint that was being written when the run died; ignored")
        candidates = self._newest_first()
        for path in candidates:
            try:
                return _read(path)
            except CheckpointError as error:
                warn(f"{error}; trying the one before it")
        if candidates:
            raise CheckpointError(
                f"{self.directory}: no checkpoint is whole; move the run directory away to start anew"
            )
        return None

    def _newest_first(self) -> list[Path]:
        return sorted(self.directory.glob("step-*"), reverse=True)


def _read(path: Path) -> Snapshot:
    try:
        content = {}
        for line in (path / SUMS).read_text().splitlines():
            digest, name = line.split("  ")
            content[name] = (path / name).read_bytes()
            if hashlib.sha256(content[name]).hexdigest() != digest:
                raise CheckpointError(f"{path / name}: the checksum differs")
        state = {"scaling": {}} | json.loads(content[STATE])  # a checkpoint older than fp16 has none
        return Snapshot(
            path=path,
            progress=Progress(**state["progress"]),
            meters=state["meters"],
            scaling=state["scaling"],
            data=state["data"],
            recipe=state["recipe"],
            weights=load(content[WEIGHTS]),
            moments=load(content[OPTIMIZER]),
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint ({type(error).__name__}: {error})") from error
