"""The images of a run: which packed set, how they are cut and scaled, and where their pixels are kept."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shards.lock import exclusive
from shards.manifest import NAME, Manifest, ShardError, read
from vaedist.config import bounded
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
    draw: int = bounded(0, at_least=0)  # `shards` is that many drawn faces, drawn at their first use

    def find(self, announce: Callable[[str], None]) -> Manifest:
        """What the packed set holds; ShardError if it is missing or damaged. `announce` shows the user a line."""
        if self.draw:
            self._draw(announce)
        return read(self.shards)

    def open(self, manifest: Manifest, announce: Callable[[str], None]) -> "Dataset":
        """The images of the set, decoded if this is their first use on this node; ShardError as above."""
        cache = self.cache.expanduser()
        train, valid = (
            open_store(manifest, split, size=self.size, crop=self.crop, kind=self.store, cache=cache, announce=announce)
            for split in ("train", "valid")
        )
        return Dataset(digest=manifest.digest, train=train, valid=valid)

    def _draw(self, announce: Callable[[str], None]) -> None:
        from shards.pack import pack_faces  # the writer's side, which a run on packed data does not need

        with exclusive(self.shards.with_name(f".{self.shards.name}.lock"), announce):
            # one process of the node draws and shows its progress; where that many are drawn already nothing happens
            try:
                pack_faces(self.shards, count=self.draw, quiet=(self.shards / NAME).exists())
            except ShardError as error:
                raise ShardError(f"{error}; to train on what is there, say data.draw=0") from None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A packed set as a run sees it."""

    digest: str  # the identity of the packed set, whatever is cut out of it
    train: Store
    valid: Store
