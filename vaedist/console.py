"""What a person sees while a run goes on: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from tqdm import tqdm


class Console:
    """`show` is false on all processes but one."""

    def __init__(self, show: bool) -> None:
        self._show = show
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

    def row(self, step: int, row: Mapping[str, float]) -> None:
        """The numbers of a logged step."""
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
