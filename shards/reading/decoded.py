"""A decoded split in one file per node: made once, by as many processes as care to help, and shared by all."""

import fcntl
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from shards.files import replacing, sync_directory
from shards.lock import exclusive
from shards.manifest import ShardError
from shards.parallel import shown
from shards.reading.reader import Reader

PIXELS, SIDECAR = "pixels.u8", "pixels.json"
CHUNK = 2**25  # bytes decoded between two writes: each process of the node has as many in memory
SLACK = 2**30  # bytes of disk a cache leaves to others
AGAIN = 0.1  # seconds between two looks at what the other processes do


class NoRoomError(ShardError):
    """The disk has no room for the decoded images."""


class Decoded:
    """The decoded images of a split, uint8 [count, *shape], in `folder`."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.path, self.shape = folder / PIXELS, tuple(identity["shape"])
        self.crc32s: list[int] = json.loads((folder / SIDECAR).read_text())["crc32s"]
        self.rows: list[int] = identity["rows"]  # in each part
        self.pixels: np.ndarray = np.memmap(self.path, np.uint8, "r", shape=self.shape)

    @property
    def digest(self) -> str:
        """Of all pixels: another one where a decoder gives other bits."""
        return hashlib.sha256(json.dumps(self.crc32s).encode()).hexdigest()

    def warm(self) -> None:
        """Reads the file once in order, so that no batch waits for the disk, and checks its bits; ShardError."""
        start, step = 0, _images_a_chunk(self.shape[1:])
        for count, crc32 in zip(self.rows, self.crc32s, strict=True):
            found = 0
            for at in range(start, start + count, step):
                found = zlib.crc32(self.pixels[at : min(at + step, start + count)].data, found)
            if found != crc32:
                raise ShardError(f"{self.path}: the decoded images are corrupt; delete this file and start again")
            start += count


def decoded(reader: Reader, cache: Path, announce: Callable[[str], None], *, quiet: bool = False) -> Decoded:
    """The decoded images that `reader` would give, made if this is their first use on this node.

    However many processes call this at once, each shard is decoded by one of them; what a killed process has finished
    stays. NoRoomError if the disk is too small, ShardError if the data set is damaged.
    """
    identity = _identity(reader)
    folder = cache / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    with exclusive(folder.with_suffix(".lock"), announce):
        defect = _defect(folder, identity)
        if defect is not None and folder.exists():
            announce(f"{folder}: {defect}; decoding again")
            shutil.rmtree(folder)
        if defect is not None:
            _begin(folder, identity, reader.split, announce)
    while _defect(folder, identity) is not None:
        _decode_parts(reader, _draft(folder), identity, quiet)
        with exclusive(folder.with_suffix(".lock"), announce):
            if _draft(folder).exists():
                _finish(folder, identity)
        time.sleep(AGAIN if _defect(folder, identity) is not None else 0)
    reader.expect([], [])  # the pixels are here: fetched shards may make room for those of other splits
    return Decoded(folder, identity)


def _identity(reader: Reader) -> dict[str, Any]:
    """Everything the decoded bits depend on."""
    return {
        "manifest": reader.library.manifest.digest,
        "split": reader.split,
        "crop": reader.crop,
        "shape": [reader.count, *reader.shape],
        "rows": [shard.count for shard in reader.library.manifest.split(reader.split).shards],
        "decoders": {name: version(name) for name in ("simplejpeg", "pillow", "torch")},
    }


def _draft(folder: Path) -> Path:
    return folder.with_suffix(".draft")


def _mark(draft: Path, part: int) -> Path:
    """The file whose presence says that a part is decoded and on the disk; it holds the part's crc32."""
    return draft / f"{part:06d}.json"


def _defect(folder: Path, identity: dict[str, Any]) -> str | None:
    """Why the cache at `folder` cannot be used; None if it can."""
    try:
        sidecar = json.loads((folder / SIDECAR).read_text())
        size = (folder / PIXELS).stat().st_size
        same = sidecar["identity"] == identity and len(sidecar["crc32s"]) == len(identity["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"unreadable ({type(error).__name__}: {error})"
    if not same:
        return f"{SIDECAR} describes other images"
    need = int(np.prod(identity["shape"]))
    return None if size == need else f"{PIXELS} has {size} bytes, not {need}"


def _begin(folder: Path, identity: dict[str, Any], split: str, announce: Callable[[str], None]) -> None:
    """Makes the draft, unless there is one that an earlier process has begun."""
    draft, need = _draft(folder), int(np.prod(identity["shape"]))
    if (draft / SIDECAR).exists():
        return
    shutil.rmtree(draft, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    room = f"{need / 1e6:,.0f} MB decoded, {free / 1e6:,.0f} MB free in {folder.parent}"
    if need + SLACK > free:
        raise NoRoomError(f"{room}, where {SLACK / 1e6:,.0f} MB are left to others")
    announce(f"{split}: decoding once for all runs on this node: {room}")
    draft.mkdir()
    with _written(folder), (draft / PIXELS).open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, need)
    with _written(folder), replacing(draft / SIDECAR) as stream:  # last: its presence means that parts may be written
        stream.write(json.dumps(identity).encode())


def _decode_parts(reader: Reader, draft: Path, identity: dict[str, Any], quiet: bool) -> None:
    """Decodes the parts, one a shard, that no other process has decoded or is decoding."""
    counts = identity["rows"]
    todo = [part for part in range(len(counts)) if not _mark(draft, part).exists()]
    then = zip(todo, [*todo[1:], None], strict=False)  # nothing to do while another process names the whole
    for part, soon in shown(then, [counts[part] for part in todo], "decoding", quiet):
        _decode_part(reader, draft, part, first=sum(counts[:part]), soon=[] if soon is None else [soon])


def _decode_part(reader: Reader, draft: Path, part: int, first: int, soon: list[int]) -> None:
    try:
        lock = (draft / f"{part:06d}.lock").open("a")
    except FileNotFoundError:
        return  # another process has finished the whole
    with lock, _written(draft):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if _mark(draft, part).exists() or not draft.exists():
            return
        ids, crc32 = first + np.arange(len(reader.rows(part))), 0
        step = _images_a_chunk(reader.shape)
        reader.expect([part], soon)
        with (draft / PIXELS).open("r+b") as stream:
            stream.seek(first * int(np.prod(reader.shape)))
            for at in range(0, len(ids), step):
                data = reader.read(ids[at : at + step]).data
                crc32 = zlib.crc32(data, crc32)
                stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        with replacing(_mark(draft, part)) as mark:
            mark.write(json.dumps(crc32).encode())


def _images_a_chunk(shape: Sequence[int]) -> int:
    return max(1, CHUNK // int(np.prod(shape)))


def _finish(folder: Path, identity: dict[str, Any]) -> None:
    """Gives the draft its name if all its parts are there; the caller holds the lock."""
    draft = _draft(folder)
    marks = [_mark(draft, part) for part in range(len(identity["rows"]))]
    if not all(mark.exists() for mark in marks):
        return
    crc32s = [json.loads(mark.read_text()) for mark in marks]
    with _written(folder), replacing(draft / SIDECAR) as stream:
        stream.write(json.dumps({"identity": identity, "crc32s": crc32s}, indent=1).encode())
    draft.replace(folder)
    sync_directory(folder.parent)
    for part in range(len(marks)):  # only now: whoever looks for a mark finds it, or no draft
        _mark(folder, part).unlink()
        (folder / f"{part:06d}.lock").unlink(missing_ok=True)


@contextmanager
def _written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ShardError(f"{folder}: the decoded images cannot be written: {error.strerror}") from None
