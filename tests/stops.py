"""`stops.py DATA OUT`: a run on two processes that is stopped, stalled and started twice; prints what came of it.

Each rank is forked: nine starts in the time of one.
"""

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cases
from attempts import Forked, lines, wait

from shards.reading.reader import Reader
from vaedist import trainer
from vaedist.console import Console

SETTINGS: dict[str, object] = {"train_steps": 150, "checkpoint_every": 1000, "evaluate_every": 1000}
data, out = map(Path, sys.argv[1:])
run, log = out / "run", out / "log"


def start(log: Path = log, run: Path = run, **more: object) -> Forked:
    return Forked(cases.words("vae", data, run, **SETTINGS | more), log)


def attempt(act: Callable[[Forked], Any], **more: object) -> dict[str, Any]:
    """What came of a start: `act` happens after the first rows."""
    before = lines(run)
    ranks = start(**more)
    wait(lambda: len(lines(run)) > len(before) + 2 or ranks.ended(), "rows")
    since = time.monotonic()
    act(ranks)
    wait(ranks.ended, "the end")
    return {
        "statuses": ranks.statuses,
        "seconds": time.monotonic() - since,
        "said": [line for line in log.read_text().splitlines() if line.startswith(("vaedist: ", f"{run}: stopped"))],
        "output": log.read_text(),
        "left": [name for name in ("STOP", "SAVE", "REQUEUE") if (run / name).exists()],
        "saved": sorted(path.name for path in (run / "checkpoints").glob("*")),
    }


def send(number: int, *to: int) -> Callable[[Forked], None]:
    return lambda ranks: [ranks.children[rank].send_signal(number) for rank in to]


def stall(ranks: Forked) -> None:
    """A process that does not even answer; SIGKILL works on it."""
    ranks.children[1].suspend()
    wait(lambda: ranks.ended() or ranks.statuses[0] is not None, "the end of the other")
    ranks.children[1].kill()


def ask(ranks: Forked) -> None:
    """By files, as a person or another program does: for a checkpoint, and then for the end."""
    (run / "SAVE").touch()
    wait(lambda: not (run / "SAVE").exists() or ranks.ended(), "the checkpoint")
    found["SAVE"] = {
        "statuses": list(ranks.statuses),
        "saved": sorted(path.name for path in (run / "checkpoints").glob("*")),
    }
    (run / "STOP").touch()


def start_again(ranks: Forked) -> None:
    """The same command while it runs; then the first is stopped."""
    second = start(out / "second")
    wait(second.ended, "the refusal")
    found["second"] = {
        "statuses": second.statuses,
        "output": (out / "second").read_text(),
        "first": list(ranks.statuses),
    }
    send(signal.SIGTERM, 0)(ranks)


found: dict[str, Any] = {}
found |= {
    "SIGUSR1": attempt(send(signal.SIGUSR1, 1)),
    "SIGUSR2": attempt(send(signal.SIGUSR2, 0)),
    "SIGTERM": attempt(send(signal.SIGTERM, 0, 1, 0)),
    "stalled": attempt(stall, train_timeout=3),
    "SIGINT": attempt(send(signal.SIGINT, 0, 1)),
    "STOP": attempt(ask),
    "started twice": attempt(start_again),
}
with patch.object(Console, "step", lambda self: time.sleep(0 if self._show else 60)):  # rank 1 does something else
    found["busy"] = attempt(lambda ranks: None, train_timeout=3)

with patch.object(Reader, "read", lambda *_: time.sleep(60)):
    early = start(run=out / "early", data_cache=out / "cache")
    wait(lambda: any((out / "cache").glob("*.draft")), "the decoding")
    send(signal.SIGTERM, 1)(early)
    since = time.monotonic()
    wait(early.ended, "the end")
    found["early"] = {"statuses": early.statuses, "seconds": time.monotonic() - since, "output": log.read_text()}

open_tracker = trainer.open_tracker
with patch.object(trainer, "open_tracker", lambda *a, **k: time.sleep(4) or open_tracker(*a, **k)):  # on rank 0
    slow = start(run=out / "slow", train_timeout=3, train_steps=1)
    wait(slow.ended, "the end")
    found["slow start"] = {"statuses": slow.statuses, "output": log.read_text()}

wait(start().ended, "the end")
wait(start(run=out / "whole").ended, "the end")
found["equal"] = lines(run) == lines(out / "whole") and len(lines(run)) == SETTINGS["train_steps"]
print(json.dumps(found, indent=1))
