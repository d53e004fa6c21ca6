"""What the trainer's loop works with, of one run; `replicas` makes one of several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vaedist import evaluators
from vaedist.backend import Backend
from vaedist.checkpoint import Progress, Writer
from vaedist.console import Console
from vaedist.data import Dataset
from vaedist.data.pixels import flip, to_float
from vaedist.data.stream import Batch, Stream
from vaedist.evaluators import Subject
from vaedist.meters import Meters
from vaedist.noise import Noise
from vaedist.objectives import Micro, Objective
from vaedist.recipe import Recipe
from vaedist.tracker import Tracker


@dataclass(frozen=True)
class Session:
    """A run between its setting up and its end."""

    recipes: Sequence[Recipe]
    backend: Backend
    data: Dataset
    objective: Objective
    model: Callable[..., dict[str, Tensor]]
    progress: Progress
    meters: Meters
    stream: Stream
    tracker: Tracker
    writer: Writer
    console: Console

    @property
    def smaller(self) -> str:
        """What makes the same run of less memory, for a user who lacks it."""
        now = self.recipes[0].train.accumulate
        half = f"train.accumulate={2 * now}, now {now}, makes the same run of half as many images at a time"
        if not self.backend.captures or self.backend.uncapturable:
            return half
        return f"{half}; train.capture=false has a step's memory once, not twice"

    def micros(self, batch: Batch) -> list[Micro]:
        """The micro-batches of a step as the model sees them."""
        found = []
        for images, positions in zip(batch.images.unbind(1), batch.positions, strict=True):
            noise = Noise(self.recipes[0].seed, positions)
            found.append((self.pixels(images, noise), noise))
        return found

    def pixels(self, images: Tensor, noise: Noise) -> Tensor:
        """Bytes [streams, local, C, H, W] as the model sees them, flipped where the sample's own coin says so."""
        if self.recipes[0].data.flip:
            coins = [noise.fork(f"stream {k}").chance("flip", 1, 0.5)[:, 0] for k in range(len(images))]
            images = flip(images, torch.stack(coins))
        return to_float(images, self.backend.dtype, self.objective.vae.pixel_range)

    def look(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The numbers and pictures of an evaluation; every rank must call it."""
        self.backend.observe()
        return evaluators.run(self.subject(self.recipes[0], self.backend.observed))

    def subject(self, recipe: Recipe, observed: Objective) -> Subject:
        """A model for the evaluators."""
        return Subject(recipe.evaluate, observed, self.data, self.backend.world, self.backend, self.progress.step)
