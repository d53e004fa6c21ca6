"""Checking a packed set against its manifest, and with `deep` every sample of it."""

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import IO

import numpy as np

from shards import image, manifest, parallel
from shards.manifest import ARRAYS, INDEX, File, Manifest
from shards.tar import BLOCK


def verify(
    directory: Path | str, *, deep: bool = False, stock: bool = False, workers: int | None = None, quiet: bool = False
) -> list[str]:
    """Every fault of a set, one line each; an empty list means it is sound. ShardError if its manifest is unreadable.

    Size and sha256 of every file; with `deep` also, for every sample, the tar headers, the crc32, whether it decodes to
    the right size, and whether its json says what the arrays say; with `stock` also whether the webdataset package,
    as anybody would use it, reads every sample.
    """
    found = manifest.read(directory)
    faults, damaged = [], set()
    for split in found.splits.values():
        for file in (*split.arrays.values(), *split.shards):
            fault = _file_fault(found.directory, file)
            if fault:
                faults.append(fault)
                damaged.add(file.name)
    listed = {shard.name for split in found.splits.values() for shard in split.shards}
    strays = sorted(path.name for path in found.directory.glob("*.tar") if path.name not in listed)
    faults += [f"{name}: not in the manifest, yet a reader of *.tar would take it" for name in strays]
    faults += _deep(found, damaged, workers, quiet) if deep else []
    return faults + (list(_stock(found)) if stock and not damaged else [])


def _file_fault(directory: Path, file: File) -> str | None:
    path = directory / file.name
    if not path.is_file():
        return f"{file.name}: missing"
    size = path.stat().st_size
    if size != file.bytes:
        return f"{file.name}: {size} bytes where the manifest says {file.bytes}"
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return None if digest == file.sha256 else f"{file.name}: its sha256 is not the one in the manifest"


@dataclass(frozen=True, kw_only=True)
class _Job:
    path: Path
    index: np.ndarray  # the rows of this shard
    arrays: dict[str, np.ndarray]  # the same rows, by the name of the entry in a sample's json
    manifest: Manifest


def _deep(found: Manifest, damaged: set[str], workers: int | None, quiet: bool) -> list[str]:
    faults, jobs = [], []
    for name, split in found.splits.items():
        sound = [key for key, file in split.arrays.items() if file.name not in damaged]
        if "index" not in sound:
            faults.append(f"{split.arrays['index'].name}: the samples of {name} cannot be found without it")
            continue
        index = found.array(name, "index")
        faults += _index_faults(found, name, index)
        arrays = {entry: found.array(name, key) for entry, key in ARRAYS.items() if key in sound}
        for number in range(len(split.shards)):
            path, rows = found.shard_path(name, number), np.flatnonzero(index["shard"] == number)
            if path.is_file():
                part = {entry: array[rows] for entry, array in arrays.items()}
                jobs.append(_Job(path=path, index=index[rows], arrays=part, manifest=found))
    counts = [len(job.index) for job in jobs]
    results = parallel.each(_shard_faults, jobs, min(workers or parallel.cores(), sum(counts) // 5000 + 1))
    return faults + [fault for part in parallel.shown(results, counts, "verified", quiet) for fault in part]


def _index_faults(found: Manifest, name: str, index: np.ndarray) -> Iterator[str]:
    file, split = found.splits[name].arrays["index"].name, found.splits[name]
    if index.dtype != INDEX:
        yield f"{file}: dtype {index.dtype} where the format has {INDEX}"
        return
    counts = np.bincount(index["shard"], minlength=len(split.shards)).tolist()
    if counts != [shard.count for shard in split.shards]:
        yield f"{file}: {counts} samples in the shards where the manifest says {[s.count for s in split.shards]}"
    if not np.array_equal(index["shard"], np.sort(index["shard"])):
        yield f"{file}: its shards are out of order"


def _shard_faults(job: _Job) -> list[str]:
    with job.path.open("rb") as stream:
        return [
            f"{job.path.name}: sample {row['image']:06d} (byte {row['offset']}): {fault}"
            for i, row in enumerate(job.index)
            for fault in _sample_faults(job, stream, i)
        ]


def _sample_faults(job: _Job, stream: IO[bytes], i: int) -> Iterator[str]:
    row = job.index[i]
    offset, length = int(row["offset"]), int(row["length"])
    try:
        key = _member(stream, offset - BLOCK, image.SUFFIXES, int(row["image"]), length)[0]
    except ValueError as error:
        yield str(error)
        key = None
    stream.seek(offset)
    data = stream.read(length)
    if zlib.crc32(data) != row["crc32"]:
        yield "the crc32 of its image is not the one in the index"
    try:
        height, width, _ = image.decode(data, job.manifest.channels).shape
        if (height, width) != (job.manifest.height or height, job.manifest.width or width):
            yield f"its image is {width} x {height}, the set {job.manifest.size_text}"
        if min(height, width) < job.manifest.smallest:
            yield f"its image is {width} x {height}, smaller than any the manifest knows"
    except ValueError as error:
        yield f"its image is {error}"
    try:
        after = offset + -(-length // BLOCK) * BLOCK
        other, size = _member(stream, after, (".json",), int(row["image"]), None)
        if key is not None and other != key:
            yield f"its json is named {other}, its image {key}"
        yield from _json_faults(job, json.loads(stream.read(size)), i)
    except ValueError as error:  # a header, or text that is not utf-8 or not json
        yield f"its json cannot be read ({error})"


def _member(stream: IO[bytes], at: int, suffixes: tuple[str, ...], number: int, length: int | None) -> tuple[str, int]:
    """Key and size of the tar member whose header is at byte `at`; ValueError unless it is the one expected there."""
    what = "json" if suffixes == (".json",) else "image"
    stream.seek(at)
    try:
        header = tarfile.TarInfo.frombuf(stream.read(BLOCK), "utf-8", "strict")
    except tarfile.HeaderError as error:
        raise ValueError(f"the tar header of its {what} is damaged ({error})") from None
    key, dot, suffix = header.name.partition(".")
    if dot + suffix not in suffixes or not key.isdecimal() or int(key) != number:
        raise ValueError(f"the tar has {header.name!r} where its {what} should be")
    if length is not None and header.size != length:
        raise ValueError(f"its image has {header.size} bytes in the tar and {length} in the index")
    return key, header.size


def _json_faults(job: _Job, entries: object, i: int) -> Iterator[str]:
    if not isinstance(entries, dict):
        yield "its json is not an object"
        return
    if entries.get("image_id") != job.index[i]["image"]:
        yield f"its json has image_id {entries.get('image_id')}"
    columns = {"attributes": job.manifest.attributes, "factors": tuple(factor.name for factor in job.manifest.factors)}
    for entry, array in job.arrays.items():
        told = entries.get(entry)
        names = tuple(told) if isinstance(told, dict) else ()
        if entry in columns and names != columns[entry]:
            yield f"its json does not have the {entry} of the manifest"
            continue
        values = list(told.values()) if isinstance(told, dict) else told
        if not np.array_equal(np.array(values, array.dtype), array[i]):
            yield f"its json and {ARRAYS[entry]}.npy disagree about {entry}"
    if "attributes" in job.arrays and (job.arrays["attributes"][i] > 1).any():
        yield "a label is neither 0 nor 1"


def _stock(found: Manifest) -> Iterator[str]:
    """Compares what stock webdataset yields, in order, with the index: the number in the key, crc32 and image_id."""
    import webdataset  # imports torch: seconds

    for name, split in found.splits.items():
        tars = [str(found.shard_path(name, number)) for number in range(len(split.shards))]
        samples = webdataset.WebDataset(tars, shardshuffle=False)
        for row, sample in zip_longest(found.array(name, "index"), samples):
            if row is None:
                yield f"{name}: webdataset reads a sample {sample['__key__']} that is not in the index"
            elif sample is None:
                yield f"{name}: webdataset does not read image {row['image']:06d}"
            else:
                data = next(sample[suffix[1:]] for suffix in image.SUFFIXES if suffix[1:] in sample)
                read = (int(sample["__key__"]), zlib.crc32(data), json.loads(sample["json"])["image_id"])
                if read != (row["image"], row["crc32"], row["image"]):
                    yield f"{name}: webdataset reads {sample['__key__']} where the index has image {row['image']:06d}"
