"""Looks at the model between steps, one file per evaluator: `run(subject)` yields (name, number or picture)."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from vaedist.backend import Backend
from vaedist.config import available, bounded
from vaedist.data.pixels import to_float
from vaedist.data.store import Store
from vaedist.data.stream import shares
from vaedist.noise import Noise
from vaedist.objectives import Objective
from vaedist.world import World

Picture = np.ndarray  # uint8 [H, W, 3]


@dataclass(frozen=True, kw_only=True)
class Config:
    every: int = bounded(10_000, at_least=1)  # steps; the last step is always evaluated
    names: tuple[str, ...] = ("elbo", "reconstructions", "samples", "traversals")
    batch: int = bounded(256, at_least=1)  # held-out images at a time, of all ranks together
    images: int | None = bounded(None, at_least=1)  # the first so many held-out images; null: all

    def __post_init__(self) -> None:
        known = available(__name__)
        for name in self.names:
            if name not in known:
                raise ValueError(f"names: no evaluator {name!r}, there are {', '.join(known)}")


@dataclass(frozen=True)
class Subject:
    """The model under evaluation and the held-out images; all ranks run every evaluator together."""

    objective: Objective
    held_out: Store
    world: World
    backend: Backend
    batch: int  # of all ranks together
    count: int  # of the held-out images that are looked at

    @classmethod
    def of(cls, config: Config, objective: Objective, held_out: Store, backend: Backend) -> "Subject":
        """What a recipe's evaluators look at."""
        count = min(held_out.count, config.images or held_out.count)
        return cls(objective, held_out, backend.world, backend, config.batch, count)

    def images(self, ids: np.ndarray) -> tuple[Tensor, Noise]:
        """Held-out images [n, C, H, W] in the model's pixel range, and noise that belongs to them for ever."""
        images = self.held_out.gather(ids).to(self.backend.device)
        return to_float(images, self.backend.dtype, self.objective.vae.pixel_range), self.noise(ids)

    def noise(self, ids: np.ndarray) -> Noise:
        """The same in every run, whatever its seed: runs are compared on the same draws."""
        return Noise(0, torch.from_numpy(ids).to(self.backend.device)).fork("evaluation")

    def share(self, count: int) -> Iterator[tuple[Tensor, Noise]]:
        """This rank's share of the first `count` held-out images, batch by batch."""
        for ids in shares(count, self.world.rank, self.world.size, max(1, self.batch // self.world.size)):
            if len(ids):
                yield self.images(ids)

    def grid(self, decoded: Tensor, columns: int) -> Picture:
        """Images in the model's pixel range, [n, C, H, W], as one picture."""
        from torchvision.utils import make_grid  # takes seconds, which a launcher's checks need not wait for

        low, high = self.objective.vae.pixel_range
        unit = ((decoded.float() - low) / (high - low)).clamp(0, 1)
        grid = make_grid(unit, nrow=columns, padding=2, pad_value=1.0)
        return (grid * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def run(config: Config, subject: Subject) -> tuple[dict[str, float], dict[str, Picture]]:
    """The numbers and the pictures of the named evaluators, with the model in evaluation mode and without gradient."""
    numbers: dict[str, float] = {}
    pictures: dict[str, Picture] = {}
    subject.objective.eval()
    with torch.no_grad(), subject.backend.autocast():
        for evaluator in config.names:
            for name, found in import_module(f"{__name__}.{evaluator}").run(subject):
                if isinstance(found, float):
                    numbers[name] = found
                else:
                    pictures[name] = found
    subject.objective.train()
    return numbers, pictures
