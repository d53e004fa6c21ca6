"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from statistics import fmean
from typing import Any

from tqdm import tqdm

LOGS = "VAEDIST_LOGS"  # a directory in which every rank but the first has a log of its own: see `log_apart`


def log_apart() -> None:
    """Sends what this process prints to a file in the directory of `LOGS`, but for rank 0, whom a person reads."""
    directory, rank = os.environ.get(LOGS), int(os.environ.get("RANK", "0"))
    if directory and rank:
        file = os.open(f"{directory}/rank-{rank:03d}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(file)


class Console:
    """Shows what rank 0, `main`, has to say, and what the others have where each has a log of its own."""

    def __init__(self, main: bool) -> None:
        self._show = main or LOGS in os.environ
        self._bar: tqdm[Any] | None = None

    def say(self, line: str) -> None:
        """One line for the user; it does not tear the bar."""
        if self._show:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def start(self, steps: int, done: int) -> None:
        self._steps, self._done, self._since = steps, done, time.monotonic()
        if self._show and sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def row(self, step: int, row: Mapping[str, Any]) -> None:
        """The numbers of a logged step; of replicas their means."""
        row = {name: fmean(value) if isinstance(value, list) else value for name, value in row.items()}
        terms = [
            f"{name.removeprefix('train/')} {value:.4g}" for name, value in row.items() if name.startswith("train/")
        ]
        held_out = [f"{name} {value:.4g}" for name, value in row.items() if name.startswith("eval/")]
        speed = f"{row['perf/images_per_s']:,.0f} images/s" if "perf/images_per_s" in row else ""
        if self._bar is not None:
            self._bar.set_postfix_str(" ".join(filter(None, [speed, *terms])))
            if held_out:
                self.say(f"step {step}: {' '.join(held_out)}")
        else:
            elapsed = time.monotonic() - self._since
            left = timedelta(seconds=round(elapsed / max(step - self._done, 1) * (self._steps - step)))
            self.say(f"step {step}/{self._steps}  {'  '.join(filter(None, [*terms, *held_out, speed]))}  {left} left")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
