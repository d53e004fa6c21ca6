"""Looks at the model between steps, one file per evaluator: `run(subject)` yields (name, number or picture)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shards.manifest import Manifest
from vaedist.backend import Backend
from vaedist.config import available, bounded
from vaedist.data import Dataset, Part
from vaedist.data.order import Ids
from vaedist.data.pixels import to_float
from vaedist.data.stream import shares
from vaedist.noise import Noise
from vaedist.objectives import Objective
from vaedist.pictures import Picture
from vaedist.posterior import Posterior
from vaedist.world import World

SETTINGS = {"evaluate.inception": "fid", "evaluate.attributes": "attributes"}  # whose evaluators they are
ENCODED = 256  # images at a time, whatever the number of ranks: the same bits from any


@dataclass(frozen=True, kw_only=True)
class Config:
    every: int = bounded(10_000, at_least=1)  # steps; the last step is always evaluated
    names: tuple[str, ...] = (
        "elbo", "quality", "reconstructions", "samples", "traversals", "interpolation", "posterior", "attributes"
    )  # fmt: skip
    attributes: tuple[str, ...] | None = None  # that are shown; null: the four nearest to half of the images
    batch: int = bounded(256, at_least=1)  # held-out images at a time, of all ranks together
    images: int | None = bounded(None, at_least=1)  # the first so many held-out images; null: all
    inception: Path | None = None  # weights that `fid` needs; null: where torch-fidelity keeps them

    def __post_init__(self) -> None:
        known = available(__name__)
        for name in self.names:
            if name not in known:
                raise ValueError(f"names: no evaluator {name!r}, there are {', '.join(known)}")
        for key, evaluator in SETTINGS.items():
            value = getattr(self, name := key.partition(".")[2])
            if value and evaluator not in self.names:
                raise ValueError(f"{name}={value} is for the evaluator {evaluator}, which names does not have")

    def require(self, manifest: Manifest, latents: int) -> None:
        """Raises ConfigError where an evaluator lacks what it needs: asked at the start of a run, not after hours."""
        for name in self.names:
            if check := getattr(import_module(f"{__name__}.{name}"), "require", None):
                check(self, manifest, latents)


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
            kind: list[type[Posterior]] = []

            def encode(ids: Ids) -> Posterior:
                q = self.objective.posterior(*self.images(ids, part))
                kind[:] = [type(q)]
                return q

            rows = self.rows(count, encode)
            self._codes[part] = kind[0](*rows)
        return self._codes[part]

    def rows(self, count: int, work: Callable[[Ids], Iterable[Tensor]], at_once: int = ENCODED) -> list[Tensor]:
        """What `work` finds about `count` images, tensors [count, ...] in their order, from its [len(ids), ...].

        All ranks compute it together, `at_once` images at a time on any number of them; every rank has all rows, the
        same bits.
        """
        chunks = [np.arange(start, min(start + at_once, count)) for start in range(0, count, at_once)]
        mine = chunks[self.world.rank :: self.world.size]
        whole: list[Tensor] = []
        for ids in mine or chunks[:1]:
            found = list(work(ids))
            whole = whole or [rows.new_zeros(count, *rows.shape[1:]) for rows in found]
            for rows, some in zip(whole, found, strict=True):
                rows[ids] = some if mine else 0
        return [self.world.sum(rows) for rows in whole]

    def noise(self, ids: np.ndarray) -> Noise:
        """The same in every run, whatever its seed: runs are compared on the same draws."""
        return Noise(0, torch.from_numpy(ids).to(self.backend.device)).fork("evaluation")

    def share(self) -> Iterator[Ids]:
        """This rank's share of the held-out images that are looked at, batch by batch."""
        for ids in shares(self.count, self.world.rank, self.world.size, max(1, self.config.batch // self.world.size)):
            if len(ids):
                yield ids

    def expected(self, z: Tensor) -> Tensor:
        """The images that the decoder expects of codes, in the model's pixel range: [n, latent] -> [n, C, H, W]."""
        objective, ids = self.objective, np.arange(ENCODED)
        found = []
        for some in objective.nearest(z).split(ENCODED):
            decoded = objective.vae.decode(some, self.noise(ids[: len(some)]))
            found.append(objective.likelihood.mean(decoded))
        return torch.cat(found)

    def tiles(self, images: Tensor, columns: int) -> np.ndarray:
        """Images [n, C, H, W] in the model's pixel range, as rows of a grid: uint8 [n / columns, columns, H, W, 3]."""
        low, high = self.objective.vae.pixel_range
        unit = ((images.float() - low) / (high - low)).clamp(0, 1)
        pixels = (unit * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1)
        return pixels.unflatten(0, (-1, columns)).cpu().numpy()

    def caption(self, text: str) -> str:
        return f"step {self.step:,} · {text}"


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
