"""Writing one shard: the tar, and the record of what is in it that lets an interrupted pack go on."""

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards import image, manifest, tar
from shards.files import replacing
from shards.manifest import FORMAT, INDEX, Shard, ShardError
from shards.sources import Images, Table, samples

CHECKS = np.dtype([("bytes", "<u4"), ("crc32", "<u4")])  # of an image as the source has it


@dataclass(frozen=True, kw_only=True)
class Job:
    """A shard to be written: its images and their rows of every table."""

    path: Path  # of the tar
    number: int  # in its split
    place: str  # of the source, for messages
    images: Images
    numbers: np.ndarray
    tables: dict[str, Table]
    npy: int | None
    crop: int | None

    def digest(self) -> str:
        """Another one for another shard: whenever its bytes may be others."""
        told = [FORMAT, self.npy, self.crop, self.images.version(), self.numbers.tolist()]
        digest = hashlib.sha256(json.dumps(told).encode())
        for entry, table in self.tables.items():
            digest.update(entry.encode() + table.digest())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a shard turned out to hold."""

    shard: Shard
    index: np.ndarray  # [count] of INDEX
    checks: np.ndarray  # [count] of CHECKS
    sizes: list[tuple[int, int, int]]  # the different (height, width, channels) in it
    suffixes: list[str]


def write_shard(job: Job) -> Record:
    """The shard of a job, written unless it is there already from an interrupted pack."""
    found = read_record(job)
    if found is not None:
        return found
    index, checks, sizes, suffixes = [], [], set(), set()
    with replacing(job.path) as stream:
        out = tar.Writer(stream)
        texts = samples(job.numbers, job.tables)
        for row, (number, original, text) in enumerate(
            zip(job.numbers.tolist(), job.images.read(), texts, strict=True)
        ):
            data, size = _encode(job, row, original)
            crc32 = zlib.crc32(data)
            checks.append((len(original), crc32 if data is original else zlib.crc32(original)))
            index.append((job.number, out.offset + tar.BLOCK, len(data), crc32, number))
            sizes.add(size)
            suffixes.add(suffix := image.suffix(data))
            out.add(f"{number:06d}{suffix}", data)
            out.add(f"{number:06d}.json", text)
        shard = Shard(**asdict(out.close(job.path)), count=len(index))
    record = Record(
        shard=shard,
        index=np.array(index, INDEX),
        checks=np.array(checks, CHECKS),
        sizes=sorted(sizes),
        suffixes=sorted(suffixes),
    )
    _write_record(job, record)
    return record


def _encode(job: Job, row: int, original: bytes) -> tuple[bytes, tuple[int, int, int]]:
    """The bytes that are stored for an image, and its size; ShardError where they are no image."""

    def error(why: str) -> ShardError:
        return ShardError(f"{job.place}: {job.images.names[row]} is {why}")

    try:
        size = image.dimensions(original)
        if job.npy is None:
            return original, size
        pixels = image.decode(original, size[2])
    except ValueError as fault:
        raise error(f"{fault}; get this image again") from None
    if job.crop is not None and job.crop > min(size[:2]):
        raise error(f"{size[1]} x {size[0]}, too small for --crop {job.crop}")
    [square] = image.scale([image.centre(pixels, job.crop)], job.npy)
    return image.to_npy(square.transpose(1, 2, 0)), (job.npy, job.npy, size[2])


def record_path(tar: Path) -> Path:
    """Where the record of a tar lies while the set is not complete."""
    return tar.with_name(f".{tar.name}.record")


def _write_record(job: Job, record: Record) -> None:
    """Only when the tar is whole under its name: a tar without a record is written again."""
    arrays = {"index": record.index.tobytes().hex(), "checks": record.checks.tobytes().hex()}
    told = {"job": job.digest(), **asdict(record), **arrays}
    with replacing(record_path(job.path)) as stream:
        stream.write(json.dumps(told).encode())


def read_record(job: Job, *, deep: bool = True) -> Record | None:
    """The record of the same shard if its tar is still what was written, by its sha256 or, not `deep`, by its size."""
    try:
        told: dict[str, Any] = json.loads(record_path(job.path).read_bytes())
        shard = Shard(**told["shard"])
        if told["job"] != job.digest() or job.path.stat().st_size != shard.bytes:
            return None
        if deep and manifest.describe(job.path).sha256 != shard.sha256:
            return None
        return Record(
            shard=shard,
            index=np.frombuffer(bytes.fromhex(told["index"]), INDEX),
            checks=np.frombuffer(bytes.fromhex(told["checks"]), CHECKS),
            sizes=[(height, width, channels) for height, width, channels in told["sizes"]],
            suffixes=told["suffixes"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None  # of a shard that was not finished
