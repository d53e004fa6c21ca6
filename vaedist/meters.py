"""The terms of the steps since the last log line, read from the device only when somebody wants to see them."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vaedist.data.stream import Stream
from vaedist.debug import refuse_nonfinite
from vaedist.world import World


@dataclass
class Meters:
    """Means over the rows of all ranks, step by step.

    `rows` are the steps already reduced, plain numbers that a checkpoint carries along, so that the first log line
    after a resume is the mean over the same steps. The reduction over ranks sums in float64, which is exact for float32
    terms: how many steps are reduced together does not change a bit.
    """

    world: World
    rows: list[dict[str, Any]] = field(default_factory=list)
    _steps: list[Tensor] = field(default_factory=list)
    _names: tuple[str, ...] = ()

    def add(self, terms: dict[str, Tensor]) -> None:
        """The terms of one step, float64 scalars; of replicas [replicas]."""
        self._names = tuple(terms)
        self._steps.append(torch.stack(list(terms.values())))

    def reduce(self, step: int) -> None:
        """Brings `rows` up to `step`, the step just ended; every rank must call it. Raises DivergedError."""
        if not self._steps:
            return
        first = step - len(self._steps) + 1
        values = self.world.mean(torch.stack(self._steps)).tolist()
        self._steps.clear()
        for number, row in enumerate(values, first):
            terms = dict(zip(self._names, row, strict=True))
            refuse_nonfinite(number, terms)
            self.rows.append(terms)

    def means(self, step: int) -> dict[str, Any]:
        """Mean of every term over the steps since `clear`; every rank must call it."""
        self.reduce(step)
        return {name: mean([row[name] for row in self.rows]) for name in self.rows[0]}

    def clear(self) -> None:
        self.rows = []


def over_micros(micros: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The terms of a step, float64: means over its micro-batches, of this rank's rows."""
    rows = [torch.stack(list(terms.values())).detach().double() for terms in micros]
    return dict(zip(micros[0], torch.stack(rows).mean(0), strict=True))


def mean(values: Sequence[Any]) -> Any:
    """Of numbers, or of each replica's."""
    if isinstance(values[0], list):
        return [mean(own) for own in zip(*values, strict=True)]
    return math.fsum(values) / len(values)


class Speed:
    """Images per second of all ranks, and the share of the time that this rank waited for them."""

    def __init__(self, stream: Stream, seen: int) -> None:
        self._stream = stream
        self.restart(seen)

    def restart(self, seen: int) -> None:
        """Begins a new measurement: evaluations and checkpoints do not count as training."""
        self._since, self._seen, self._waited = time.perf_counter(), seen, self._stream.waited

    def measure(self, seen: int) -> dict[str, float]:
        seconds = time.perf_counter() - self._since
        row = {
            "perf/images_per_s": (seen - self._seen) / seconds,
            "perf/data_wait": (self._stream.waited - self._waited) / seconds,
        }
        self.restart(seen)
        return row
