"""The images of a run: which packed set, how they are cut and scaled, and where their pixels are kept."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shards.manifest import NAME, read
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
        manifest = read(self.shards)
        cache = self.cache.expanduser()
        train, valid = (
            open_store(manifest, split, size=self.size, crop=self.crop, kind=self.store, cache=cache, announce=announce)
            for split in ("train", "valid")
        )
        return Dataset(digest=manifest.digest, train=train, valid=valid)

    def _draw(self, announce: Callable[[str], None]) -> None:
        from shards.pack import pack_faces  # the writer's side, which a run on packed data does not need

        with exclusive(self.shards.with_name(f".{self.shards.name}.lock"), announce):
            if not (self.shards / NAME).exists():
                pack_faces(self.shards, count=self.draw)  # one process of the node, which shows its progress


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A packed set as a run sees it."""

    digest: str  # the identity of the packed set, whatever is cut out of it
    train: Store
    valid: Store

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        return self.train.shape
