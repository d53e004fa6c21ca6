"""Where a run takes place: what environment.json records beside the recipe."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shards.files import replacing
from vaedist.words import ConfigError

PACKAGES = ("torch", "torchvision", "accelerate", "webdataset", "wandb", "numpy")
BUILT_FROM = Path(__file__).resolve().parents[1] / "COMMIT"  # in an image, which has no checkout

SLURM = {
    "job": "SLURM_JOB_ID",
    "array_job": "SLURM_ARRAY_JOB_ID",
    "array_task": "SLURM_ARRAY_TASK_ID",
    "restart": "SLURM_RESTART_COUNT",
    "nodes": "SLURM_JOB_NODELIST",
}


def environment(*, step: int, world_size: int, device: str, data: str) -> dict[str, Any]:
    """Commit, versions, processes, the digest of the data set and the SLURM job, for a start after `step` steps."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "step": step,
        "commit": _git("rev-parse", "HEAD") or (BUILT_FROM.read_text().strip() if BUILT_FROM.exists() else None),
        "modified": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "host": platform.node(),
        "world_size": world_size,
        "device": device,
        "data": data,
        "slurm": {key: os.environ[name] for key, name in SLURM.items() if name in os.environ},
    }


def add_start(path: Path, where: Mapping[str, Any]) -> None:
    """Adds to the list of the run's starts. Raises ConfigError where the file is none."""
    try:
        starts = json.loads(path.read_text()) if path.exists() else []
    except ValueError:
        starts = None
    if not isinstance(starts, list):
        raise ConfigError(f"{path}: is not a list of the run's starts; move it away, a new one will be begun")
    with replacing(path) as file:
        file.write(f"{json.dumps([*starts, where], indent=1)}\n".encode())


def _git(*words: str) -> str | None:
    """What git says of the source, None where there is no git or no checkout."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
