"""What will be written before a byte is: which images go into which shard. A pure function of source and options."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from shards.manifest import SPLITS, ShardError
from shards.sources import Source, samples
from shards.tar import BLOCK

MEGABYTE = 10**6
NPY_HEADER = 128  # bytes
SHOWN = 3  # shards of every split in the table


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a source is packed."""

    shard_mb: float = 64  # size of a shard in 10^6 bytes, about
    shuffle: int | None = None  # the seed of the order inside the shards; None: the order of the image numbers
    npy: int | None = None  # store decoded squares of that many pixels a side instead of the source's own bytes
    crop: int | None = None  # the centre square of the source that these are scaled from; None: the largest

    def __post_init__(self) -> None:
        if not 0 < self.shard_mb < math.inf:
            raise ShardError(f"a shard of {self.shard_mb} MB is impossible; --shard-mb must be positive")
        for option, value in (("--size", self.npy), ("--crop", self.crop)):
            if value is not None and value < 1:
                raise ShardError(f"{option} {value} is impossible; it is a number of pixels")
        if self.crop is not None and self.npy is None:
            raise ShardError("--crop cuts images packed with --encoding npy; original bytes are kept whole")

    @property
    def shard_bytes(self) -> int:
        return max(1, round(self.shard_mb * MEGABYTE))


@dataclass(frozen=True)
class Part:
    """What one of several packs of the same set writes: every `count`-th shard, from `index` on."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def slice(self) -> slice:
        return slice(self.index, None, self.count)


WHOLE = Part(0, 1)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The shards of a set, in order."""

    name: str  # of the set
    source: Source
    options: Options
    shards: list[tuple[str, int, np.ndarray]]  # split, number in it, rows of the source

    @cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """The rows of the source in each split that has any, in the order of its samples."""
        names = dict.fromkeys(split for split, _, _ in self.shards)
        return {name: np.concatenate([rows for split, _, rows in self.shards if split == name]) for name in names}

    def counts(self, split: str) -> list[int]:
        """The number of samples in every shard of a split."""
        return [len(rows) for name, _, rows in self.shards if name == split]

    def table(self) -> Iterator[str]:
        """The lines of a description for people: the splits, and the first shards of each."""
        numbers, megabytes = self.source.numbers, costs(self.source, self.options.npy) / MEGABYTE
        yield f"{self.name}: {len(numbers):,} images of {self.source.place}"
        yield ""
        yield f"{'split':<20}{'shards':>10}{'images':>12}{'MB, about':>12}"
        lines = [(split, [rows for name, _, rows in self.shards if name == split]) for split in self.rows]
        for name, parts in [*lines, ("all", [rows for _, _, rows in self.shards])]:
            every = np.concatenate(parts)
            yield f"{name:<20}{len(parts):>10,}{len(every):>12,}{megabytes[every].sum():>12,.1f}"
        yield ""
        yield f"{'shard':<20}{'first':>10}{'last':>10}{'images':>12}{'MB, about':>12}"
        for split, parts in lines:
            for number, rows in enumerate(parts[:SHOWN]):
                ends = f"{numbers[rows[0]]:>10d}{numbers[rows[-1]]:>10d}"
                yield f"{tar_name(split, number):<20}{ends}{len(rows):>12,}{megabytes[rows].sum():>12,.1f}"
            if len(parts) > SHOWN:
                yield f"and {len(parts) - SHOWN:,} more, to {tar_name(split, len(parts) - 1)}"


def plan(name: str, source: Source, options: Options) -> Plan:
    """Cuts every split into consecutive shards of equal size, about `options.shard_mb`."""
    shards, size = [], costs(source, options.npy)
    rows_in_order = order(source.numbers, options.shuffle)
    for value, split in enumerate(SPLITS):
        rows = rows_in_order[source.split[rows_in_order] == value]
        shards += [(split, number, rows[part]) for number, part in enumerate(cut(size[rows], options.shard_bytes))]
    return Plan(name=name, source=source, options=options, shards=shards)


def costs(source: Source, npy: int | None) -> np.ndarray:
    """Bytes that each sample takes in a tar, about: image and json, each in whole blocks after one of header."""
    images = source.bytes if npy is None else np.full(len(source.bytes), 3 * npy**2 + NPY_HEADER)
    last = np.array([-1])  # its json is about as long as any
    text = next(samples(source.numbers[last], {entry: table.rows(last) for entry, table in source.tables.items()}))
    return (-(-images // BLOCK) - (-len(text) // BLOCK) + 2) * BLOCK


def cut(cost: np.ndarray, shard_bytes: int) -> list[slice]:
    """Consecutive samples of these sizes in bytes as shards of equal size, about `shard_bytes`."""
    total, end = int(cost.sum()), np.cumsum(cost)
    shard = (end - cost) * math.ceil(total / shard_bytes) // max(1, total)
    starts = [*np.flatnonzero(np.diff(shard, prepend=-1)).tolist(), len(cost)]
    return [slice(start, stop) for start, stop in pairwise(starts)]


def tar_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tar"


def order(numbers: np.ndarray, seed: int | None) -> np.ndarray:
    """The rows in the order in which they are packed; by hashes, so that it outlives every version of a library."""
    if seed is None:
        return np.arange(len(numbers))
    keys = [hashlib.blake2b(f"{seed} {number}".encode(), digest_size=8).digest() for number in numbers.tolist()]
    return np.argsort(np.array(keys, "S8").view(">u8").ravel(), kind="stable")
