"""`save_and_die.py DIRECTORY TRIALS`: forks processes that save checkpoints without pause and kills each with SIGKILL.

For every trial it prints the last step that the process said it had saved, the step found on disk afterwards, and how
many drafts lay about. Forked, because importing torch takes a thousand times as long as a trial.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from vaedist.checkpoint import Checkpoints, Progress, State

WEIGHTS = {"weight": torch.randn(300, 300)}
MOMENTS = {f"weight/{name}": torch.randn(300, 300) for name in ("exp_avg", "exp_avg_sq")}


def save_for_ever(checkpoints: Checkpoints, start: int, report: int) -> None:
    for step in range(start + 1, sys.maxsize):
        checkpoints.save(
            State(
                progress=Progress(step, step), meters=[], scaling={}, data="", recipe={},
                weights=WEIGHTS, moments=MOMENTS,
            )
        )  # fmt: skip
        os.write(report, f"{step}\n".encode())


def trial(checkpoints: Checkpoints, directory: Path, start: int) -> dict[str, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        save_for_ever(checkpoints, start, writer)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        pipe.readline()  # it has saved at least once
        time.sleep(random.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved = [start + 1, *map(int, pipe.read().split())][-1]
    drafts = len(list(directory.glob(".step-*.draft")))
    snapshot = checkpoints.newest(lambda line: None)
    assert snapshot is not None
    return {"saved": saved, "found": snapshot.progress.step, "drafts": drafts}


if __name__ == "__main__":
    torch.set_num_threads(1)  # a forked process has no thread pool
    random.seed(0)
    place, trials = Path(sys.argv[1]), int(sys.argv[2])
    found = 0
    for _ in range(trials):
        result = trial(Checkpoints(place, keep=2), place, found)
        found = result["found"]
        print(json.dumps(result), flush=True)
