"""dSprites and 3D Shapes as sources: all combinations of a few factors, drawn, or read from the official file."""

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from zlib import crc32

import numpy as np

from shards import image, manifest
from shards.manifest import Factor, ShardError
from shards.sources import Images, Source, Table, official

CHUNK = 1024  # images drawn together
BYTES = {"dsprites": 104, "shapes3d": 2_700}  # of an image, about


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Images of a set by their rows in the official order; `Images`, see there."""

    rows: np.ndarray

    @property
    def names(self) -> list[str]:
        return [f"{row + 1:06d}.png" for row in self.rows.tolist()]

    def part(self, rows: np.ndarray) -> Self:
        return replace(self, rows=self.rows[rows])

    def pixels(self) -> Iterator[np.ndarray]:
        """bool [64, 64] or uint8 [64, 64, 3] of each."""
        raise NotImplementedError

    def read(self) -> Iterator[bytes]:
        return map(image.to_png, self.pixels())

    def crc32s(self) -> Iterable[int]:
        return map(crc32, self.read())

    def version(self) -> object:
        return self.rows.tolist()


@dataclass(frozen=True, kw_only=True)
class Drawn(Pictures):
    """Pictures that a module of this package draws."""

    name: str

    def pixels(self) -> Iterator[np.ndarray]:
        painter = _painter(self.name)
        for start in range(0, len(self.rows), CHUNK):
            pictures = painter.images(self.rows[start : start + CHUNK])
            yield from pictures if pictures.ndim == 4 else pictures.astype(bool)


@dataclass(frozen=True, kw_only=True)
class Bitmaps(Pictures):
    """Pictures of two colours, held in memory: those of the .npz are one stream that can only be unpacked whole."""

    bits: np.ndarray  # uint8 [n, 64, 8]

    def part(self, rows: np.ndarray) -> Self:
        return replace(self, rows=self.rows[rows], bits=self.bits[rows])

    def pixels(self) -> Iterator[np.ndarray]:
        return (np.unpackbits(bits, axis=1).view(bool) for bits in self.bits)


@dataclass(frozen=True, kw_only=True)
class Stored(Pictures):
    """Pictures in the .h5, read where they are packed."""

    file: Path

    def pixels(self) -> Iterator[np.ndarray]:
        return iter(official.h5_images(self.file, self.rows))


def source(name: str, *, file: Path | None = None, count: int | None = None) -> Source:
    """The set of that name; images 1, 2, ... in the official order, all to train on.

    file: the official one to read instead of drawing. count: only so many, from the first. ShardError for a file that
    is damaged or whose factors are not those of the official order.
    """
    painter = _painter(name)
    rows = np.arange(painter.COUNT if count is None else count)
    factors = painter.factors(rows)
    if file is None:
        images: Images = Drawn(rows=rows, name=name)
        made_from = {"generator": name}
    else:
        told = (official.npz_factors if name == "dsprites" else official.h5_factors)(file)
        if told.shape != factors.shape or not np.allclose(told, factors, rtol=0, atol=1e-6):
            raise ShardError(f"{file}: its factors are not those of the {len(rows):,} images of {name} in their order")
        in_memory = name == "dsprites"
        images = (
            Bitmaps(rows=rows, bits=official.npz_bits(file, len(rows))) if in_memory else Stored(rows=rows, file=file)
        )
        made_from = {"file": manifest.describe(file).sha256}
    return Source(
        place=f"{name}, drawn" if file is None else str(file.absolute()),
        images=images,
        numbers=rows + 1,
        bytes=np.full(len(rows), BYTES[name]),
        split=np.zeros(len(rows), np.int8),
        tables={"factors": Table(columns=tuple(painter.FACTORS), values=factors)},
        digests={**made_from, "count": str(len(rows))},
        factors=tuple(
            Factor(name=factor, values=tuple(np.array(values, np.float32).tolist()))
            for factor, values in painter.FACTORS.items()
        ),
        determined=True,
        drawn=True,
    )


def _painter(name: str) -> Any:
    return importlib.import_module(f"shards.sources.{name}")  # that of shapes3d imports torch: seconds
