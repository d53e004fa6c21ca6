"""`save_and_die.py DIRECTORY TRIALS`: forks processes that save checkpoints without pause and kills each with SIGKILL.

Every other process saves while it goes on changing its weights, which are all the number of the step. For every trial
it prints the last step that the process knew to be saved, the step found on disk afterwards, the weights found in it,
and how many drafts lay about. Forked, because importing torch takes a thousand times as long as a trial.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from vaedist.checkpoint import Checkpoints, Progress, State, Writer, drafts

WEIGHTS = {"weight": torch.randn(300, 300)}
MOMENTS = {f"weight/{name}": torch.randn(300, 300) for name in ("exp_avg", "exp_avg_sq")}


def state(step: int) -> State:
    return State(
        progress=Progress(step, step), meters=[], scaling={}, data="", recipe={},
        weights={name: torch.full_like(weight, step) for name, weight in WEIGHTS.items()}, moments=MOMENTS,
    )  # fmt: skip


def save_for_ever(checkpoints: Checkpoints, start: int, report: int, beside: bool) -> None:
    writer = Writer(checkpoints.save, required=True, warn=print)
    for step in range(start + 1, sys.maxsize):
        if beside:
            writer.save(state(step))  # which waits for the one before
        else:
            checkpoints.save(state(step))
        os.write(report, f"{step - beside}\n".encode())


def trial(checkpoints: Checkpoints, start: int, beside: bool) -> dict[str, object]:
    reader, writer = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        save_for_ever(checkpoints, start, writer, beside)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        for _ in range(1 + beside):  # it has saved at least once
            pipe.readline()
        time.sleep(random.uniform(0, time.monotonic() - began))  # about as long as a save takes on this disk
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved = [start + 1, *map(int, pipe.read().split())][-1]
    unfinished = len(drafts(checkpoints.directory))
    snapshot = checkpoints.newest(lambda line: None)
    assert snapshot is not None
    weights = sorted({number for tensor in snapshot.weights.values() for number in tensor.unique().tolist()})
    return {"saved": saved, "found": snapshot.progress.step, "weights": weights, "drafts": unfinished}


if __name__ == "__main__":
    torch.set_num_threads(1)  # a forked process has no thread pool
    random.seed(0)
    place, trials = Path(sys.argv[1]), int(sys.argv[2])
    found = 0
    for number in range(trials):
        result = trial(Checkpoints(place, keep=2), found, beside=number % 2 == 1)
        found = result["found"]
        print(json.dumps(result), flush=True)
