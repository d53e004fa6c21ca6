"""The images of a run: which packed set, how they are cut and scaled, and where their pixels are kept."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from shards.lock import exclusive
from shards.manifest import NAME, Manifest, ShardError
from shards.reading.library import CACHE, Library
from shards.reading.reader import Reader
from vaedist.config import ConfigError, bounded
from vaedist.data.order import FullOrder, Order, WindowOrder
from vaedist.data.store import Kind, PassingStore, Store, TarStore, open_store

Part = Literal["train", "valid"]
CPU = torch.device("cpu")
EVALUATED = 8  # fetched shards, at most, that the processes of a node look at in an evaluation at one time


@dataclass(frozen=True, kw_only=True)
class Config:
    """`crop` null means the largest centre square.

    `auto` is `device` on a GPU with ample memory, else `host` where the disk of `cache` has room, else `tar`.
    """

    shards: str = "data/celeba"  # a directory that `python -m shards` has made, or its URL, see docs/data.md
    size: int = bounded(64, at_least=1)  # pixels a side, after cropping
    crop: int | None = bounded(148, at_least=1)  # pixels a side of the centre square
    flip: bool = False  # mirror half of the training images, anew in every epoch
    store: Kind = "auto"  # decode once into the device or per node, or at every access
    window: int | None = bounded(None, at_least=1)  # shards among which a `tar` store shuffles; null: all
    cache: Path = CACHE  # fetched shards and decoded images, on a disk of the node
    cache_gb: float | None = bounded(None, above=0, at_most=10**9)  # 10^9 bytes for fetched shards; null: all they need
    pipe: bool = False  # run the `pipe:` commands that the manifest names
    draw: int = bounded(0, at_least=0)  # `shards` is that many drawn faces, drawn at their first use
    instead_of: str | None = None  # digest of the set that the run was begun with, to go on with this one knowingly

    def find(self, announce: Callable[[str], None]) -> Library:
        """The packed set; ShardError if it is missing or damaged. `announce` shows the user a line."""
        if self.draw:
            self._draw(announce)
        limit = None if self.cache_gb is None else round(self.cache_gb * 1e9)
        return Library(self.shards, self.cache, limit=limit, pipe=self.pipe, announce=announce)

    def open(
        self,
        library: Library,
        announce: Callable[[str], None],
        *,
        device: torch.device = CPU,
        streams: int = 1,
        threads: int = 1,
        quiet: bool = True,
    ) -> "Dataset":
        """The images of the set, decoded if this is their first use on this node, by `threads`; ShardError as above.

        streams: how many orders of the training images will be read at once, each through windows of its own.
        """
        if self.window is not None and self.store != "tar":
            raise ConfigError("data.window is for sets larger than the disk: it needs data.store=tar")
        cache, splits = self.cache.expanduser(), library.manifest.splits
        if "valid" not in splits:
            announce(f"{library.location}: no valid split: eval/ figures are of training images")

        self._require_room(library, streams)

        def store(split: str) -> Store:
            reader = Reader(library, split, size=self.size, crop=self.crop, threads=threads)
            return open_store(reader, kind=self.store, cache=cache, device=device, announce=announce, quiet=quiet)

        train = store("train")
        shared = "valid" not in splits and self.window is None  # windows leave a reader only the shards of their own
        valid = train if shared else store("valid" if "valid" in splits else "train")
        if self.window is not None and isinstance(valid, TarStore):
            valid = PassingStore(valid.reader)
        return Dataset(manifest=library.manifest, train=train, valid=valid, window=self.window)

    def _require_room(self, library: Library, streams: int) -> None:
        if self.store != "tar":
            return
        splits = library.manifest.splits
        train, valid = splits["train"].shards, splits.get("valid", splits["train"]).shards
        if self.window is None:
            at_once = sum({shard.name: shard.bytes for shard in (*train, *valid)}.values())
        else:
            sizes = [sorted((shard.bytes for shard in shards), reverse=True) for shards in (train, valid)]
            at_once = sum(sizes[0][: 2 * self.window * streams]) + sum(sizes[1][:EVALUATED])
        library.require_room(at_once, "raise data.cache_gb, or shuffle in smaller windows: data.window")

    def _draw(self, announce: Callable[[str], None]) -> None:
        from shards.packing.pack import pack_faces  # the writer's side, which a run on packed data does not need

        shards = Path(self.shards)
        with exclusive(shards.with_name(f".{shards.name}.lock"), announce):
            # one process of the node draws and shows its progress; where that many are drawn already nothing happens
            try:
                pack_faces(shards, count=self.draw, quiet=(shards / NAME).exists())
            except ShardError as error:
                raise ShardError(f"{error}; to train on what is there, say data.draw=0") from None


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A packed set as a run sees it."""

    manifest: Manifest
    train: Store
    valid: Store  # the held-out images; those of train where the set has no others
    window: int | None

    @property
    def digest(self) -> str:
        """The identity of the packed set, whatever is cut out of it."""
        return self.manifest.digest

    def order(self, seed: int) -> Order:
        """The order of the training images under a seed."""
        if self.window is None:
            return FullOrder(self.train.count, seed)
        return WindowOrder([shard.count for shard in self.manifest.split("train").shards], self.window, seed)

    def array(self, part: Part, name: str) -> np.ndarray:
        """What the set knows of the images of a part, a row each: see `shards.manifest.Split.arrays`."""
        return self.manifest.array(part if part in self.manifest.splits else "train", name)
