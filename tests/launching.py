"""Starts a script as a user does, in one process or in several, and reads what it complains of."""

import os
import subprocess
import sys
from pathlib import Path

TRAIN = Path(__file__).resolve().parents[1] / "vaedist" / "train.py"


def launch(
    *words: object, processes: int | None = None, flags: tuple[str, ...] = (), script: Path = TRAIN, timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of a script with these words; without `processes` as accelerate itself would choose."""
    several = ["--multi_gpu", "--num_processes", processes, "--main_process_port", 0] if processes else []
    command = [Path(sys.executable).with_name("accelerate"), "launch", *several, *flags, script, *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=timeout)


def interpreted(script: str) -> tuple[int, str]:
    """The status and the complaints of a script for whose kernels no GPU is needed."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


def complaints(output: str) -> list[str]:
    """The lines with which a run ends that went wrong."""
    return [line for line in output.splitlines() if line.startswith("vaedist: ")]
