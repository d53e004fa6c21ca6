"""Writing one shard: which samples it holds, the json of each, the tar and its rows of the index."""

import io
import json
import math
import tarfile
import zlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from shards import celeba, jpeg, manifest
from shards.celeba import Image, Table
from shards.files import replacing
from shards.manifest import INDEX, Shard, ShardError

BLOCK = 512  # of a tar
OWNER = "vaedist"  # user and group of every member, so that those of whoever packs do not show


@dataclass(frozen=True, kw_only=True)
class Job:
    """A shard to be written: its images, their rows of every table, and the size they must have."""

    path: Path  # of the tar
    number: int  # in its split
    source: Path
    images: list[Image]
    tables: dict[str, Table]
    height: int
    width: int


def plan(sizes: np.ndarray, shard_bytes: int) -> list[slice]:
    """Cut samples with images of these sizes, in bytes, into consecutive shards of equal size, about `shard_bytes`."""
    # the image and the json have a header of one block each, and the json itself is about two blocks
    cost = (-(-sizes.astype(np.int64) // BLOCK) + 4) * BLOCK
    total, end = int(cost.sum()), np.cumsum(cost)
    shard = (end - cost) * math.ceil(total / shard_bytes) // total
    starts = [*np.flatnonzero(np.diff(shard, prepend=-1)).tolist(), len(sizes)]
    return [slice(start, stop) for start, stop in pairwise(starts)]


def write_shard(job: Job) -> tuple[Shard, np.ndarray]:
    """Write the tar of a job; returns its description and its rows of the index."""
    index = np.zeros(len(job.images), INDEX)
    with (
        replacing(job.path) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for row, data in enumerate(celeba.read_images(job.source, job.images)):
            name = job.images[row].name
            _check_image(job, name, data)
            index[row] = (job.number, tar.offset + BLOCK, len(data), zlib.crc32(data), celeba.number(name))
            key = name.removesuffix(".jpg")
            _add(tar, f"{key}.jpg", data)
            _add(tar, f"{key}.json", describe_sample(name, job.tables, row))
    file = manifest.describe(job.path)
    return Shard(name=file.name, bytes=file.bytes, sha256=file.sha256, count=len(index)), index


def describe_sample(name: str, tables: dict[str, Table], row: int) -> bytes:
    """The json of one sample: what belongs to the image, whatever the set it is in."""
    entries: dict[str, object] = {"image_id": celeba.number(name)}
    for entry, table in tables.items():
        value = table.values[row]
        # by its shortest text, so that a float32 of 0.1 reads 0.1
        plain = [float(str(v)) for v in value] if value.dtype.kind == "f" else value.tolist()
        entries[entry] = dict(zip(table.columns, plain, strict=True)) if table.columns else plain
    return json.dumps(entries, separators=(",", ":")).encode()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a member exactly as webdataset's TarWriter(mtime=0) would. Importing that one imports torch, which takes
    every worker longer than writing a shard does."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.uname, member.gname = len(data), 0o444, OWNER, OWNER
    tar.addfile(member, io.BytesIO(data))


def _check_image(job: Job, name: str, data: bytes) -> None:
    try:
        height, width = jpeg.dimensions(data)
    except ValueError as error:
        raise ShardError(f"{job.source}: {name} is {error}; get this image again") from None
    if (height, width) != (job.height, job.width):
        here, first = f"{width} x {height}", f"{job.width} x {job.height}"
        raise ShardError(f"{job.source}: {name} is {here} where the first image is {first}; all must have one size")
