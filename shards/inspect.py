"""Showing what a packed set holds: counts, sizes, the means of its attributes, its factors, a grid of samples."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from shards import image
from shards.files import replacing
from shards.manifest import ARRAYS, Manifest, ShardError

COLUMNS = 12
LARGEST = 256  # pixels a side of a picture in the grid
ROWS = {"train": 6, "valid": 2, "test": 2}


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
    yield ""
    if found.attributes:
        yield f"{'share of images with':<24}" + "".join(f"{name:>9}" for name in found.splits)
        means = [found.array(name, "labels").mean(axis=0) for name in found.splits]
        for column, attribute in enumerate(found.attributes):
            yield f"  {attribute:<22}" + "".join(f"{mean[column]:>9.3f}" for mean in means)
    if found.factors:
        yield ""
        yield f"{'factor':<24}{'least':>9}{'mean':>9}{'most':>9}"
        values = np.concatenate([found.array(name, "factors") for name in found.splits])
        for column, factor in enumerate(found.factors):
            value = values[:, column]
            yield f"  {factor.name:<22}{value.min():>9.3f}{value.mean():>9.3f}{value.max():>9.3f}"
    if any(ARRAYS["bbox"] in split.arrays for split in found.splits.values()):
        yield ""
        yield "bbox: in the coordinates of the in-the-wild photographs, not of these aligned images"
    yield ""
    yield from (f"source  {key}  {value}" for key, value in found.source.items())


def grid(found: Manifest) -> Image.Image:
    """A contact sheet: evenly spaced samples of each split, a band of rows each, in the order of the splits."""
    width, height = found.width or LARGEST, found.height or LARGEST
    scale = min(1.0, LARGEST / max(width, height))
    cell = (max(1, round(width * scale)), max(1, round(height * scale)))
    bands = []
    for name, rows in ROWS.items():
        if name in found.splits:
            count = found.splits[name].count
            chosen = np.unique(np.linspace(0, count - 1, min(count, rows * COLUMNS)).astype(int))
            bands.append([_sample(found, name, int(i)) for i in chosen])
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


def _sample(found: Manifest, split: str, i: int) -> Image.Image:
    row = found.array(split, "index")[i]
    path = found.shard_path(split, int(row["shard"]))
    with path.open("rb") as stream:
        stream.seek(int(row["offset"]))
        data = stream.read(int(row["length"]))
    try:
        return Image.fromarray(image.decode(data, 3))
    except ValueError as error:
        hint = f"see `python -m shards verify {found.directory}`"
        raise ShardError(f"{path}: sample {row['image']:06d} is {error}; {hint}") from None
