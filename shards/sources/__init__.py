"""What can be packed: numbered images in splits and the tables that describe them, wherever they come from."""

import hashlib
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

    def digest(self) -> bytes:
        """Another one for other contents."""
        values = repr(self.values.tolist()).encode() if self.values.dtype == object else self.values.tobytes()
        kind = repr((self.columns, self.values.dtype.str, self.values.shape)).encode()
        return hashlib.sha256(kind + values).digest()


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
    entries = "".join(f',"{entry}":%s' for entry in tables)
    form = f'{{"image_id":%d{entries}}}'
    for values in zip(numbers.tolist(), *map(_texts, tables.values()), strict=True):
        yield (form % values).encode()


def _texts(table: Table) -> Iterator[str]:
    """The json of each row; by a template, since json.dumps would take longer than all else of a pack."""
    values = table.values
    if values.dtype == object:
        return map(json.dumps, values.tolist())
    form = "%d"
    if values.dtype.kind == "f":
        values, form = values.astype(str).astype(np.float64), "%r"  # by its shortest text, so that 0.1 reads 0.1
    if not table.columns:
        return (form % value for value in values.tolist())
    names = [json.dumps(column).replace("%", "%%") for column in table.columns]
    row_form = "{" + ",".join(f"{name}:{form}" for name in names) + "}"
    return (row_form % tuple(row) for row in values.tolist())
