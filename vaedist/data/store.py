"""From image ids to pixels: decoded from the tars at every access, or once per node into a memory map."""

import hashlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from shards import image
from shards.files import sync_directory
from shards.lock import exclusive
from shards.manifest import Manifest, ShardError, check_size
from shards.parallel import cores, shown
from vaedist.data.order import Ids

Kind = Literal["auto", "host", "tar"]

PIXELS, SIDECAR = "pixels.u8", "pixels.json"
CHUNK = 512  # images decoded between two writes
SLACK = 2**30  # bytes of disk a cache leaves to others


class Store(Protocol):
    """The pixels of one split; all stores give the same bits."""

    count: int
    shape: tuple[int, int, int]  # channels, size, size

    def gather(self, ids: Ids, out: Tensor | None = None) -> Tensor:
        """The images `ids` (int64 [n], 0 <= id < count) as uint8 [n, *shape], in `out` if given."""
        ...


class TarStore:
    """Reads the tars by their index and decodes at every access, on all cores; needs no space.

    The centre square of `crop` pixels a side (None: the largest there is) is scaled to `size`, see `shards.image`.
    ShardError where the payload is not the one that was packed.
    """

    def __init__(self, manifest: Manifest, split: str, *, size: int, crop: int | None) -> None:
        where = manifest.directory
        if manifest.scaled and (size, crop) != (manifest.height, manifest.crop):
            cure = f"say data.size={manifest.height} data.crop={'null' if manifest.crop is None else manifest.crop}"
            raise ShardError(f"{where}: its images were scaled when they were packed; {cure}")
        if not manifest.scaled and crop is not None and crop > manifest.smallest:
            raise ShardError(f"data.crop={crop} is larger than the images of {where}: {manifest.size_text}")
        self.manifest, self.split, self.size = manifest, split, size
        self.crop = None if manifest.scaled else crop
        self.count, self.shape = manifest.split(split).count, (manifest.channels, size, size)
        self._index = np.array(manifest.array(split, "index"))
        self._tars = [self._map(number) for number in range(len(manifest.split(split).shards))]
        self._pool = ThreadPoolExecutor(cores(), "decode")

    def gather(self, ids: Ids, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty((len(ids), *self.shape), dtype=torch.uint8)
        list(self._pool.map(self._decode, ids.tolist(), out.numpy()))  # list: waits for all, raises the first error
        return out

    def _map(self, number: int) -> np.ndarray:
        path = self.manifest.shard_path(self.split, number)
        check_size(path, self.manifest.split(self.split).shards[number].bytes)
        return np.asarray(np.memmap(path, np.uint8, "r"))

    def _decode(self, row: int, out: np.ndarray) -> None:
        shard, offset, length, crc32, number = self._index[row].item()
        payload = self._tars[shard][offset : offset + length].tobytes()
        if zlib.crc32(payload) != crc32:
            raise self._corrupt(shard, offset, number, "its crc32 is not the one of the index")
        try:
            out[:] = image.square(image.decode(payload, self.shape[0]), self.crop, self.size)
        except ValueError as error:
            raise self._corrupt(shard, offset, number, f"it is {error}") from None

    def _corrupt(self, shard: int, offset: int, number: int, reason: str) -> ShardError:
        path = self.manifest.shard_path(self.split, shard)
        cure = f"run `python -m shards verify {self.manifest.directory}`"
        return ShardError(f"{path}: image {number:06d} at byte {offset} is corrupt: {reason}; {cure}")


class HostStore:
    """A decoded split in one memory map, which all processes of the node share through the page cache."""

    def __init__(self, folder: Path, count: int, shape: tuple[int, int, int]) -> None:
        self.count, self.shape = count, shape
        self.path = folder / PIXELS
        self.crc32 = int(json.loads((folder / SIDECAR).read_text())["crc32"])
        self._bytes = np.asarray(np.memmap(self.path, np.uint8, "r"))
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # nothing ever writes to this tensor
            self._pixels = torch.from_numpy(self._bytes).view(count, *shape)

    def gather(self, ids: Ids, out: Tensor | None = None) -> Tensor:
        return torch.index_select(self._pixels, 0, torch.from_numpy(ids), out=out)

    def warm(self) -> None:
        """Reads the file once in order, so that no batch waits for the disk, and checks its bits."""
        crc32, step = 0, 2**26
        for start in range(0, len(self._bytes), step):
            crc32 = zlib.crc32(self._bytes[start : start + step].data, crc32)
        if crc32 != self.crc32:
            raise ShardError(f"{self.path}: the decoded images are corrupt; delete this file and start again")


def open_store(
    manifest: Manifest,
    split: str,
    *,
    size: int,
    crop: int | None,
    kind: Kind,
    cache: Path,
    announce: Callable[[str], None],
) -> Store:
    """The pixels of a split; `kind` auto is host if the disk of `cache` has room for the decoded images, else tar.

    However many processes call this at once, one decodes and the others wait. ShardError if `kind` is host and there
    is no room, or if the data set is damaged.
    """
    source = TarStore(manifest, split, size=size, crop=crop)
    if kind == "tar":
        return source
    identity = _identity(source)
    folder = cache / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    need = int(np.prod(identity["shape"]))
    with exclusive(folder.with_suffix(".lock"), announce):
        defect = _defect(folder, identity)
        if defect is not None:
            if folder.exists():
                announce(f"{folder}: {defect}; decoding again")
                shutil.rmtree(folder)
            shutil.rmtree(_draft(folder), ignore_errors=True)
            free = shutil.disk_usage(cache).free
            room = f"{need / 1e6:,.0f} MB decoded, {free / 1e6:,.0f} MB free in {cache}"
            if need + SLACK > free and kind == "host":
                raise ShardError(f"no room for split {split!r}: {room}; name another folder or use the store 'tar'")
            if need + SLACK > free:
                announce(f"{split}: decoding from the tars at every access, for want of room: {room}")
                return source
            announce(f"{split}: decoding once for all runs on this node: {room}")
            _build(source, folder, identity)
    store = HostStore(folder, source.count, source.shape)
    if need < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
        store.warm()
    announce(f"{split}: {store.count:,} decoded images, {need / 1e6:,.0f} MB, from {folder}")
    return store


def _identity(source: TarStore) -> dict[str, Any]:
    """Everything the decoded bits depend on."""
    return {
        "manifest": source.manifest.digest,
        "split": source.split,
        "crop": source.crop,
        "shape": [source.count, *source.shape],
        "decoders": {name: version(name) for name in ("simplejpeg", "pillow", "torch")},
    }


def _draft(folder: Path) -> Path:
    return folder.with_suffix(".draft")


def _defect(folder: Path, identity: dict[str, Any]) -> str | None:
    """Why the cache at `folder` cannot be used; None if it can."""
    try:
        sidecar = json.loads((folder / SIDECAR).read_text())
        size = (folder / PIXELS).stat().st_size
        same = sidecar["identity"] == identity and isinstance(sidecar["crc32"], int)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"unreadable ({type(error).__name__}: {error})"
    if not same:
        return f"{SIDECAR} describes other images"
    need = int(np.prod(identity["shape"]))
    return None if size == need else f"{PIXELS} has {size} bytes, not {need}"


def _build(source: TarStore, folder: Path, identity: dict[str, Any]) -> None:
    """Decodes all images into a draft folder, which takes its name once it is whole and on the disk."""
    draft, crc32 = _draft(folder), 0
    draft.mkdir()
    chunks = np.split(np.arange(source.count), range(CHUNK, source.count, CHUNK))
    try:
        with (draft / PIXELS).open("wb") as stream:
            for pixels in shown(map(source.gather, chunks), [len(ids) for ids in chunks], "decoding", quiet=False):
                data = pixels.numpy().data
                crc32 = zlib.crc32(data, crc32)
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        with (draft / SIDECAR).open("w") as text:
            json.dump({"identity": identity, "crc32": crc32}, text, indent=1)
            text.flush()
            os.fsync(text.fileno())
        sync_directory(draft)
        draft.replace(folder)
        sync_directory(folder.parent)
    except OSError as error:
        raise ShardError(f"{folder}: the decoded images cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
