"""The images of a run: which packed set, how they are cut and scaled, and where their pixels are kept."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shards.manifest import NAME, Manifest, read
from vaedist.config import bounded
from vaedist.data.lock import exclusive
from vaedist.data.store import Kind, Store, open_store


@dataclass(frozen=True, kw_only=True)
class Config:
    """`crop` null means the largest centre square. `auto` is `host` where the disk of `cache` has room, else `tar`."""

    shards: Path = Path("data/celeba")  # a directory that `python -m shards pack` has made
    size: int = bounded(64, at_least=1)  # pixels a side, after cropping
    crop: int | None = bounded(148, at_least=1)  # pixels a side of the centre square
    flip: bool = False  # mirror half of the training images, anew in every epoch
    store: Kind = "auto"  # decode once per node, or at every access
    cache: Path = Path("~/.cache/vaedist")  # decoded images, on a disk of the node
    draw: int = bounded(0, at_least=0)  # draw that many faces into `shards` if there is nothing yet

    def open(self, announce: Callable[[str], None]) -> "Dataset":
        """The data set; ShardError if it is missing or damaged. `announce` shows the user a line."""
        if self.draw and not (self.shards / NAME).exists():
            self._draw(announce)
        return Dataset(config=self, manifest=read(self.shards), announce=announce)

    def _draw(self, announce: Callable[[str], None]) -> None:
        from shards.pack import pack_faces  # the writer's side, which a run on packed data does not need

        with exclusive(self.shards.with_name(f".{self.shards.name}.lock"), announce):
            if not (self.shards / NAME).exists():
                pack_faces(self.shards, count=self.draw)  # one process of the node, which shows its progress


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A packed set as a run sees it; the splits open at first use."""

    config: Config
    manifest: Manifest
    announce: Callable[[str], None]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        return 3, self.config.size, self.config.size

    @property
    def digest(self) -> str:
        """The identity of the packed set, whatever is cut out of it."""
        return self.manifest.digest

    @cached_property
    def train(self) -> Store:
        return self.store("train")

    @cached_property
    def valid(self) -> Store:
        return self.store("valid")

    def store(self, split: str) -> Store:
        """The pixels of any split. ShardError if there is no such split."""
        config = self.config
        return open_store(
            self.manifest,
            split,
            size=config.size,
            crop=config.crop,
            kind=config.store,
            cache=config.cache.expanduser(),
            announce=self.announce,
        )
