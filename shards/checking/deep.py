"""Checking every sample of a tar: its headers, its crc32, its pixels, and what its texts say."""

import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from shards import image
from shards.checking.tars import Samples, faults
from shards.foreign.contents import LARGEST_TEXT
from shards.manifest import ARRAYS
from shards.tar import BLOCK


def sample_faults(job: Samples) -> list[str]:
    """Every fault of some samples of a tar, one line each."""
    return faults(job, _faults)


def _faults(job: Samples, path: Path) -> Iterator[str]:
    with path.open("rb") as stream:
        for i, row in enumerate(job.index):
            where = f"sample {job.keys[i]} (byte {row['offset']})"
            if not BLOCK <= int(row["offset"]) <= job.tar.shard.bytes - int(row["length"]):
                yield f"{where}: its image does not lie in the tar"
                continue
            yield from (f"{where}: {fault}" for fault in _image_faults(job, stream, i))
            if not job.foreign:
                yield from (f"{where}: {fault}" for fault in _own_faults(job, stream, i))


def _image_faults(job: Samples, stream: IO[bytes], i: int) -> Iterator[str]:
    row, found = job.index[i], job.manifest
    stream.seek(int(row["offset"]))
    data = stream.read(int(row["length"]))
    if zlib.crc32(data) != row["crc32"]:
        yield "the crc32 of its image is not the one in the index"
    try:
        height, width, _ = image.decode(data, found.channels).shape
    except ValueError as error:
        yield f"its image is {error}"
        return
    if (height, width) != (found.height or height, found.width or width):
        yield f"its image is {width} x {height}, the set {found.size_text}"
    if min(height, width) < found.smallest:
        yield f"its image is {width} x {height}, where the least side in the manifest is {found.smallest}"


def _own_faults(job: Samples, stream: IO[bytes], i: int) -> Iterator[str]:
    """What is wrong with the headers and the json of a sample that this program has packed."""
    row = job.index[i]
    offset, length, number = int(row["offset"]), int(row["length"]), int(row["image"])
    key = None
    try:
        key = _member(stream, offset - BLOCK, image.SUFFIXES, number, length)[0]
    except ValueError as error:
        yield str(error)
    try:
        after = offset + -(-length // BLOCK) * BLOCK
        other, size = _member(stream, after, (".json",), number, None)
        if key is not None and other != key:
            yield f"its json is named {other}, its image {key}"
        if size > LARGEST_TEXT:
            raise ValueError(f"it has {size:,} bytes")
        yield from _json_faults(job, json.loads(stream.read(size)), i)
    except (ValueError, RecursionError) as error:  # a header, or text that is not utf-8 or not json
        yield f"its json cannot be read ({error})"


def _member(stream: IO[bytes], at: int, suffixes: tuple[str, ...], number: int, length: int | None) -> tuple[str, int]:
    """Key and size of the tar member whose header is at byte `at`; ValueError unless it is the one expected there."""
    what = "json" if suffixes == (".json",) else "image"
    stream.seek(at)
    try:
        header = tarfile.TarInfo.frombuf(stream.read(BLOCK), "utf-8", "strict")
    except tarfile.HeaderError as error:
        raise ValueError(f"the tar header of its {what} is damaged ({error})") from None
    if header.size < 0:
        raise ValueError(f"the tar header of its {what} claims {header.size} bytes")
    key, dot, suffix = header.name.partition(".")
    if dot + suffix not in suffixes or not key.isdecimal() or int(key) != number:
        raise ValueError(f"the tar has {header.name!r} where its {what} should be")
    if length is not None and header.size != length:
        raise ValueError(f"its image has {header.size} bytes in the tar and {length} in the index")
    return key, header.size


def _json_faults(job: Samples, entries: object, i: int) -> Iterator[str]:
    if not isinstance(entries, dict):
        yield "its json is not an object"
        return
    if entries.get("image_id") != job.index[i]["image"]:
        yield f"its json has image_id {entries.get('image_id')}"
    columns = {"attributes": job.manifest.attributes, "factors": tuple(factor.name for factor in job.manifest.factors)}
    for entry, array in job.arrays.items():
        value = entries.get(entry)
        names = tuple(value) if isinstance(value, dict) else ()
        if entry in columns and names != columns[entry]:
            yield f"its json does not have the {entry} of the manifest"
        elif not _same(list(value.values()) if isinstance(value, dict) else value, array[i]):
            yield f"its json and {ARRAYS[entry]}.npy disagree about {entry}"


def _same(value: object, row: np.ndarray) -> bool:
    try:
        return np.array_equal(np.array(value, row.dtype), row)
    except (ValueError, TypeError, OverflowError):  # no numbers, or none of this kind
        return False
