"""What can be packed: numbered images in splits and the tables that describe them, wherever they come from."""

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from shards.manifest import Factor


@dataclass(frozen=True, kw_only=True)
class Table:
    """Values of one kind for n images: [n, columns], or [n] where there are no columns to name."""

    columns: tuple[str, ...]
    values: np.ndarray  # integers, floats, or str objects

    def rows(self, which: np.ndarray) -> "Table":
        """The same for some of the images."""
        return Table(columns=self.columns, values=self.values[which])


class Images(Protocol):
    """Encoded images in some order. Picklable and without state, so that any process can read its part."""

    @property
    def names(self) -> Sequence[str]:
        """What the source calls each image, for messages."""
        ...

    def part(self, rows: np.ndarray) -> "Images":
        """Some of them, in the order of `rows`."""
        ...

    def read(self) -> Iterator[bytes]:
        """The bytes of each; ShardError where the source is damaged."""
        ...

    def crc32s(self) -> Iterable[int]:
        """The crc32 of the bytes of each."""
        ...

    def version(self) -> object:
        """What json can hold, another one whenever the bytes may have changed; found without reading them."""
        ...


@dataclass(frozen=True, kw_only=True)
class Files:
    """Images that are files below a folder."""

    folder: Path
    names: list[str]
    stamps: list[tuple[int, int]]  # size in bytes and time of the last change in ns

    def part(self, rows: np.ndarray) -> "Files":
        return Files(folder=self.folder, names=[self.names[i] for i in rows], stamps=[self.stamps[i] for i in rows])

    def read(self) -> Iterator[bytes]:
        return ((self.folder / name).read_bytes() for name in self.names)

    def crc32s(self) -> Iterable[int]:
        return map(zlib.crc32, self.read())

    def version(self) -> object:
        return [self.names, self.stamps]


@dataclass(frozen=True, kw_only=True)
class Source:
    """n images in the order in which they are packed, checked for consistency; none has been opened yet."""

    place: str  # for messages
    images: Images
    numbers: np.ndarray  # int64 [n]: of each image in the set, ascending; its key in the tars
    bytes: np.ndarray  # int64 [n]: of each encoded image; a guess where images are drawn
    split: np.ndarray  # int8 [n]: index into SPLITS
    tables: dict[str, Table]  # entries of the json; those in manifest.ARRAYS become arrays; attributes are 0 or 1
    digests: dict[str, str]  # what it was made from: file name -> sha256, or a generator's arguments
    factors: tuple[Factor, ...] = ()  # what the columns of the table `factors` are
    determined: bool = False  # the digests determine the images
    drawn: bool = False  # reading an image takes milliseconds


def samples(numbers: np.ndarray, tables: dict[str, Table]) -> Iterator[bytes]:
    """The json of each image: what belongs to it, whatever the set it is in."""
    entries = {"image_id": numbers.tolist()} | {entry: _plain(table) for entry, table in tables.items()}
    for values in zip(*entries.values(), strict=True):
        yield json.dumps(dict(zip(entries, values, strict=True)), separators=(",", ":")).encode()


def _plain(table: Table) -> Iterator[object]:
    """Of each row, what json can hold."""
    values = table.values
    if values.dtype.kind == "f":
        values = values.astype(str).astype(np.float64)  # by its shortest text, so that a float32 of 0.1 reads 0.1
    rows = values.tolist()
    return (dict(zip(table.columns, row, strict=True)) for row in rows) if table.columns else iter(rows)
