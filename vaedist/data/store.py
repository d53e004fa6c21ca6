"""From image ids to pixels: decoded at every access, once per node into a memory map, or once into the device."""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from shards.manifest import ShardError
from shards.reading.decoded import Decoded, NoRoomError, decoded
from shards.reading.reader import Reader
from vaedist.data.order import Ids

Kind = Literal["auto", "device", "host", "tar"]

SHARE = 0.15  # of the device's free memory that `auto` gives to images
CHUNK = 2**26  # bytes of a copy to the device


class Store(Protocol):
    """The pixels of one split; all stores give the same bits."""

    count: int
    shape: tuple[int, int, int]  # channels, size, size
    device: torch.device  # where `gather` leaves the images

    @property
    def digest(self) -> str | None:
        """Of all pixels; None where they are decoded at every access."""
        ...

    def gather(self, ids: Ids, out: Tensor | None = None) -> Tensor:
        """The images `ids` (int64 [n], 0 <= id < count) as uint8 [n, *shape] on `device`, in `out` if given."""
        ...

    def expect(self, now: Sequence[int], soon: Sequence[int]) -> None:
        """What comes next is in the shards `now`, and after those in the shards `soon`."""
        ...


class TarStore:
    """Decodes at every access; needs no space but that of the tars."""

    device = torch.device("cpu")
    digest = None

    def __init__(self, reader: Reader) -> None:
        self.reader, self.count, self.shape = reader, reader.count, reader.shape
        self.expect = reader.expect

    def gather(self, ids: Ids, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty((len(ids), *self.shape), dtype=torch.uint8)
        self.reader.read(ids, out.numpy())
        return out


class PassingStore(TarStore):
    """A tar store that is read once through, as in an evaluation: it keeps no shard longer than it needs it."""

    def gather(self, ids: Ids, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty((len(ids), *self.shape), dtype=torch.uint8)
        for shard in self.reader.shards_of(ids):  # one by one: images from everywhere need no room for everything
            self.reader.expect([shard], [])
            mine = np.flatnonzero(self.reader.in_shard(ids, shard))
            out[mine] = super().gather(ids[mine])
        return out


class HostStore:
    """A decoded split in one memory map, which all processes of the node share through the page cache."""

    device = torch.device("cpu")

    def __init__(self, images: Decoded) -> None:
        self.count, self.shape, self.digest = images.shape[0], images.shape[1:], images.digest
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # nothing ever writes to this tensor
            self._pixels = torch.from_numpy(np.asarray(images.pixels))

    def gather(self, ids: Ids, out: Tensor | None = None) -> Tensor:
        return torch.index_select(self._pixels, 0, torch.from_numpy(ids), out=out)

    def expect(self, now: Sequence[int], soon: Sequence[int]) -> None:
        pass  # all shards are here


class DeviceStore(HostStore):
    """A decoded split in the memory of the device."""

    def __init__(self, images: Decoded, device: torch.device) -> None:
        super().__init__(images)
        self.device, host = device, self._pixels
        self._pixels = torch.empty(host.shape, dtype=torch.uint8, device=device)
        rows = self._pixels.flatten(1)  # eight pixels are copied as fast as one
        self._words = rows.view(torch.int64) if rows.shape[1] % 8 == 0 else rows
        step = max(1, CHUNK // int(np.prod(self.shape)))
        for start in range(0, self.count, step):
            self._pixels[start : start + step] = host[start : start + step]

    def gather(self, ids: Ids, out: Tensor | None = None) -> Tensor:
        where = torch.from_numpy(ids)
        if self.device.type == "cuda":
            where = where.pin_memory().to(self.device, non_blocking=True)
        return torch.index_select(self._pixels, 0, where, out=out)

    def take(self, ids: Tensor) -> Tensor:
        """The images whose ids [...] are on the device already: [..., *shape]."""
        images = torch.index_select(self._words, 0, ids.flatten()).view(torch.uint8)
        return images.view(*ids.shape, *self.shape)


def open_store(
    reader: Reader,
    *,
    kind: Kind,
    cache: Path,
    device: torch.device,
    announce: Callable[[str], None],
    quiet: bool = True,
) -> Store:
    """The pixels of a split. `kind` auto is device where that is a GPU with ample memory, else host where the disk of
    `cache` has room for the decoded images, else tar; it says which and why.

    However many processes call this at once, each shard is decoded by one of them. ShardError if there is no room for
    what was asked for, or if the data set is damaged.
    """
    need, split = reader.count * int(np.prod(reader.shape)), reader.split
    size = f"{reader.count:,} images of {split}, {need / 1e6:,.0f} MB decoded"
    if kind == "tar":
        announce(f"store tar: {size}, at every access")
        return TarStore(reader)
    try:
        images = decoded(reader, cache, announce, quiet=quiet)
    except NoRoomError as error:
        if kind != "auto":
            raise ShardError(f"no room for {split}: {error}; name another data.cache or say data.store=tar") from None
        announce(f"store tar: {size}, at every access, for want of room: {error}")
        return TarStore(reader)
    if need < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
        images.warm()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    if kind == "device" or (kind == "auto" and need <= SHARE * free):
        if device.type == "cuda" and need > free:
            raise ShardError(f"no room for {split}: {need / 1e6:,.0f} MB, {free / 1e6:,.0f} MB free on {device}")
        announce(f"store device: {size}, {free / 1e6:,.0f} MB free on {device}")
        return DeviceStore(images, device)
    reason = f", more than {SHARE:.0%} of the {free / 1e6:,.0f} MB free on {device}" if kind == "auto" and free else ""
    announce(f"store host: {size}{reason}, from {images.path.parent}")
    return HostStore(images)
