"""Looks at the model between steps, one file per evaluator: `run(subject)` yields (name, number or picture)."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vaedist.backend import Backend
from vaedist.config import available, bounded
from vaedist.data import Dataset, Part
from vaedist.data.order import Ids
from vaedist.data.pixels import to_float
from vaedist.data.stream import shares
from vaedist.noise import Noise
from vaedist.objectives import Objective
from vaedist.posterior import Posterior
from vaedist.world import World

Picture = np.ndarray  # uint8 [H, W, 3], or [frames, H, W, 3] of an animation
ENCODED = 256  # images at a time, whatever the number of ranks: the same bits from any


@dataclass(frozen=True, kw_only=True)
class Config:
    every: int = bounded(10_000, at_least=1)  # steps; the last step is always evaluated
    names: tuple[str, ...] = ("elbo", "reconstructions", "samples", "traversals", "quality")
    batch: int = bounded(256, at_least=1)  # held-out images at a time, of all ranks together
    images: int | None = bounded(None, at_least=1)  # the first so many held-out images; null: all
    inception: Path | None = None  # weights that `fid` needs; null: where torch-fidelity keeps them

    def __post_init__(self) -> None:
        known = available(__name__)
        for name in self.names:
            if name not in known:
                raise ValueError(f"names: no evaluator {name!r}, there are {', '.join(known)}")
            if require := getattr(import_module(f"{__name__}.{name}"), "require", None):
                require(self)  # raises ValueError where it lacks something
        if self.inception and "fid" not in self.names:
            raise ValueError(f"inception={self.inception} is for the evaluator fid, which names does not have")


@dataclass(frozen=True)
class Subject:
    """The model after `step` steps and the data; all ranks run every evaluator together."""

    config: Config
    objective: Objective
    data: Dataset
    world: World
    backend: Backend
    step: int
    _codes: dict[Part, Posterior] = field(default_factory=dict, init=False)

    @property
    def count(self) -> int:
        """How many held-out images are looked at, the first ones."""
        return min(self.data.valid.count, self.config.images or self.data.valid.count)

    def images(self, ids: np.ndarray, part: Part = "valid") -> tuple[Tensor, Noise]:
        """Images [n, C, H, W] in the model's pixel range, and noise that belongs to them for ever."""
        images = getattr(self.data, part).gather(ids).to(self.backend.device)
        return to_float(images, self.backend.dtype, self.objective.vae.pixel_range), self.noise(ids)

    def codes(self, part: Part = "valid") -> Posterior:
        """q(z | x) of all training images or of the held-out ones that are looked at, [n, latent], in their order.

        Computed once, by all ranks together; every rank has all rows, the same bits on any number of ranks.
        """
        if part not in self._codes:
            count = self.count if part == "valid" else self.data.train.count
            chunks = [np.arange(start, min(start + ENCODED, count)) for start in range(0, count, ENCODED)]
            mine = chunks[self.world.rank :: self.world.size]
            whole: Posterior | None = None
            for ids in mine or chunks[:1]:
                some = self.objective.posterior(*self.images(ids, part))
                whole = whole or type(some)(*(rows.new_zeros(count, rows.shape[1]) for rows in some))
                for rows, found in zip(whole, some, strict=True):
                    rows[ids] = found if mine else 0
            assert whole is not None
            self._codes[part] = type(whole)(*map(self.world.sum, whole))
        return self._codes[part]

    def noise(self, ids: np.ndarray) -> Noise:
        """The same in every run, whatever its seed: runs are compared on the same draws."""
        return Noise(0, torch.from_numpy(ids).to(self.backend.device)).fork("evaluation")

    def share(self) -> Iterator[Ids]:
        """This rank's share of the held-out images that are looked at, batch by batch."""
        for ids in shares(self.count, self.world.rank, self.world.size, max(1, self.config.batch // self.world.size)):
            if len(ids):
                yield ids

    def grid(self, decoded: Tensor, columns: int) -> Picture:
        """Images in the model's pixel range, [n, C, H, W], as one picture."""
        from torchvision.utils import make_grid  # takes seconds, which a launcher's checks need not wait for

        low, high = self.objective.vae.pixel_range
        unit = ((decoded.float() - low) / (high - low)).clamp(0, 1)
        grid = make_grid(unit, nrow=columns, padding=2, pad_value=1.0)
        return (grid * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def run(subject: Subject) -> tuple[dict[str, float], dict[str, Picture]]:
    """The numbers and the pictures of the named evaluators, with the model in evaluation mode and without gradient."""
    numbers: dict[str, float] = {}
    pictures: dict[str, Picture] = {}
    subject.objective.eval()
    with torch.no_grad(), subject.backend.autocast():
        for evaluator in subject.config.names:
            for name, found in import_module(f"{__name__}.{evaluator}").run(subject):
                if isinstance(found, float):
                    numbers[name] = found
                else:
                    pictures[name] = found
    subject.objective.train()
    return numbers, pictures
