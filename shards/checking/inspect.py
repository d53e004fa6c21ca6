"""Showing what a packed set holds: counts, sizes, the means of its attributes, its factors, a grid of samples."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from shards import image
from shards.checking.tars import Tar, local, tars
from shards.files import replacing
from shards.manifest import ARRAYS, Factor, Manifest, ShardError
from shards.remote.protocols import shown

COLUMNS = 12
LARGEST = 256  # pixels a side of a picture in the grid
ROWS = {"train": 6, "valid": 2, "test": 2}
LONG = 50  # attributes; of more, only the most and the least frequent are shown
ENDS = 8  # so many of each
VALUES = 4  # of a discrete factor that are shown, from either end


def report(found: Manifest) -> Iterator[str]:
    """The lines of a description of the set."""
    yield f"{found.directory}: {found.name}, {found.size_text} {found.encoding}, manifest {found.digest}"
    yield ""
    yield f"{'split':<8}{'images':>10}{'shards':>8}{'MB':>10}{'bytes/image':>13}  arrays"
    for name, split in found.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        mean = found.array(name, "index")["length"].mean()
        arrays = ", ".join(split.arrays)
        yield f"{name:<8}{split.count:>10,}{len(split.shards):>8}{size / 1e6:>10,.1f}{mean:>13,.0f}  {arrays}"
    yield from _elsewhere(found)
    if found.attributes:
        yield ""
        yield from _attributes(found)
    if found.factors:
        yield ""
        yield from _factors(found)
    if any(ARRAYS["bbox"] in split.arrays for split in found.splits.values()):
        yield ""
        yield "bbox: in the coordinates of the in-the-wild photographs, not of these aligned images"
    yield ""
    yield from (f"source  {key}  {value}" for key, value in found.source.items())


def _elsewhere(found: Manifest) -> Iterator[str]:
    """Where shards lie that do not lie in the directory of the set."""
    urls = list(dict.fromkeys(tar.shard.url for tar in tars(found) if tar.shard.url is not None))
    if urls:
        yield ""
        yield f"{len(urls):,} shards lie elsewhere: {shown(urls[0])}{' ...' if len(urls) > 1 else ''}"


def _attributes(found: Manifest) -> Iterator[str]:
    yield f"{'share of images with':<24}" + "".join(f"{name:>9}" for name in found.splits)
    means = np.stack([found.array(name, "labels").mean(axis=0) for name in found.splits])
    columns, left_out = list(range(len(found.attributes))), 0
    if len(columns) > LONG:
        by_share = np.argsort(-means[0], kind="stable").tolist()
        columns, left_out = by_share[:ENDS] + by_share[-ENDS:], len(columns) - 2 * ENDS
    for place, column in enumerate(columns):
        if left_out and place == ENDS:
            yield f"  and {left_out:,} more, then the rarest:"
        yield f"  {found.attributes[column]:<22}" + "".join(f"{mean:>9.3f}" for mean in means[:, column])


def _factors(found: Manifest) -> Iterator[str]:
    yield f"{'factor':<24}{'least':>9}{'mean':>9}{'most':>9}  values"
    table = np.concatenate([found.array(name, "factors") for name in found.splits])
    for column, factor in enumerate(found.factors):
        value = table[:, column]
        numbers = f"{value.min():>9.3f}{value.mean():>9.3f}{value.max():>9.3f}"
        yield f"  {factor.name:<22}{numbers}  {_values(factor)}"


def _values(factor: Factor) -> str:
    values = [f"{value:g}" for value in factor.values]
    if len(values) > 2 * VALUES:
        values = [*values[:VALUES], "...", *values[-VALUES:]]
    return f"{len(factor.values)}: {' '.join(values)}" if values else "continuous"


def grid(found: Manifest) -> Image.Image:
    """A contact sheet: evenly spaced samples of each split, a band of rows each, in the order of the splits.

    Shards behind URLs are left out, unless there are no others: then it shows the first of each split.
    """
    width, height = found.width or LARGEST, found.height or LARGEST
    scale = min(1.0, LARGEST / max(width, height))
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    bands = [_samples(found, name, rows * COLUMNS) for name, rows in ROWS.items() if name in found.splits]
    heights = [-(-len(band) // COLUMNS) for band in bands]
    sheet = Image.new("RGB", (COLUMNS * cell[0], sum(heights) * cell[1]), "white")
    top = 0
    for band, rows in zip(bands, heights, strict=True):
        for i, picture in enumerate(band):
            picture.thumbnail(cell)
            sheet.paste(picture, (i % COLUMNS * cell[0], (top + i // COLUMNS) * cell[1]))
        top += rows
    return sheet


def save_grid(found: Manifest, path: Path) -> None:
    """Write the contact sheet as a PNG, atomically."""
    with replacing(path) as stream:
        grid(found).save(stream, format="PNG")


def _samples(found: Manifest, split: str, most: int) -> list[Image.Image]:
    index = found.array(split, "index")
    own = {number: tar for tar in tars(found) for name, number in tar.parts if name == split}
    here = [number for number, tar in own.items() if tar.url is None] or [0]
    rows = np.flatnonzero(np.isin(index["shard"], here))
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(int))]
    pictures: list[Image.Image] = []
    for number in dict.fromkeys(index["shard"][chosen].tolist()):
        pictures += _pictures(found, split, own[number], chosen[index["shard"][chosen] == number])
    return pictures


def _pictures(found: Manifest, split: str, tar: Tar, rows: np.ndarray) -> Iterator[Image.Image]:
    """Samples of one tar."""
    index = found.array(split, "index")
    with local(tar) as path, path.open("rb") as stream:
        for row in rows.tolist():
            stream.seek(int(index["offset"][row]))
            data = stream.read(int(index["length"][row]))
            try:
                yield Image.fromarray(image.decode(data, 3))
            except ValueError as error:
                hint = f"see `python -m shards verify {found.directory}`"
                raise ShardError(f"{path}: sample {found.key(split, row)} is {error}; {hint}") from None
