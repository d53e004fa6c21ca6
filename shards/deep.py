"""Checking every sample of a tar: its headers, its crc32, its pixels, and what its texts say."""

import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from shards import image, index
from shards.described import IMAGE
from shards.foreign import LARGEST_TEXT, Scan
from shards.manifest import ARRAYS, ShardError
from shards.plan import BLOCK
from shards.tars import Samples, local


def sample_faults(job: Samples) -> list[str]:
    """Every fault of the samples of a tar, one line each."""
    try:
        with local(job.tar) as path:
            return [f"{job.tar.shard.name}: {fault}" for fault in _faults(job, path)]
    except ShardError as error:
        return [f"{job.tar.shard.name}: {error}"]


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
    if job.foreign:
        yield from _foreign_faults(job, path)


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


def _foreign_faults(job: Samples, path: Path) -> Iterator[str]:
    """How a tar that somebody else has made is not as it was when it was indexed."""
    source = job.manifest.source
    try:
        scan = index.scan(str(path), source.get(IMAGE))
    except ShardError as error:
        yield str(error)
        return
    if len(scan.index) != len(job.index):
        yield f"{len(scan.index):,} samples where the index has {len(job.index):,}"
        return
    good = np.ones(len(scan.index), bool)
    for field in ("offset", "length", "crc32"):
        good &= scan.index[field] == job.index[field]
    good &= np.array([key.decode("utf-8", "surrogateescape") for key in scan.keys.tolist()]) == np.array(job.keys)
    yield from (f"sample {job.keys[i]}: the tar has another here, or elsewhere" for i in np.flatnonzero(~good))
    tables = _tables(job, scan)
    for entry, array in job.arrays.items():
        same = (tables[entry] == array).reshape(len(array), -1).all(axis=1) if entry in tables else np.zeros(len(array))
        yield from (
            f"sample {job.keys[i]}: the tar and {ARRAYS[entry]}.npy disagree about {entry}"
            for i in np.flatnonzero(same == 0)
        )


def _tables(job: Samples, scan: Scan) -> dict[str, np.ndarray]:
    """What the texts of the tar say, in the form of the arrays."""
    if scan.told is not None:
        return {entry: table.values for entry, table in scan.told[1].items() if _fits(table.values, job, entry)}
    if (scan.classes < 0).any():
        return {}
    classes = np.arange(len(job.manifest.attributes))
    return {"attributes": (scan.classes[:, None] == classes).astype(np.uint8)}


def _fits(values: np.ndarray, job: Samples, entry: str) -> bool:
    return entry in job.arrays and values.shape == job.arrays[entry].shape
