"""A table of labels: a .csv whose first column names images and whose others are attributes, and perhaps the split."""

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.manifest import SPLITS, ShardError
from shards.sources import Table

SPLIT_NAMES = {**dict(zip(SPLITS, range(3), strict=True)), "val": 1, "validation": 1}


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a table says of n images, each named once."""

    path: Path
    sha256: str
    names: list[str]  # as in the file
    attributes: Table  # uint8 [n, columns] of 0 and 1
    split: np.ndarray | None  # int8 [n]: index into SPLITS


def read_labels(path: Path) -> Labels:
    """Parse a table; ShardError names the line of a fault."""
    data = path.read_bytes()
    try:
        lines = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        rows = [(lines.line_num, [cell.strip() for cell in row]) for row in lines if any(map(str.strip, row))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ShardError(f"{path}: not a .csv of UTF-8 text ({error})") from None
    if len(rows) < 2:
        raise ShardError(f"{path}: it needs a line that names the columns, and one for every image")
    header = rows.pop(0)[1]
    if "" in header[1:] or len(set(header)) < len(header):
        raise ShardError(f"{path}: line 1: the columns must have names, each another")
    lines_of: dict[str, int] = {}
    for line, row in rows:
        if len(row) != len(header):
            raise ShardError(f"{path}: line {line}: {len(row)} values where line 1 has {len(header)} columns")
        if (before := lines_of.setdefault(row[0], line)) != line:
            raise ShardError(f"{path}: line {line}: {row[0]} was in line {before} already")
    columns = [column for column in range(1, len(header)) if header[column] != "split"]
    values = [_bits(path, header[column], [(line, row[0], row[column]) for line, row in rows]) for column in columns]
    split = None
    if "split" in header[1:]:
        split = _split(path, [(line, row[header.index("split", 1)]) for line, row in rows])
    return Labels(
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        names=list(lines_of),
        attributes=Table(
            columns=tuple(header[column] for column in columns),
            values=np.stack(values, axis=1) if values else np.zeros((len(rows), 0), np.uint8),
        ),
        split=split,
    )


def _bits(path: Path, column: str, cells: Sequence[tuple[int, str, str]]) -> np.ndarray:
    """uint8 [n] of a column of 0 and 1, or of -1 and 1."""
    off = "-1" if any(cell == "-1" for _, _, cell in cells) else "0"
    for line, name, cell in cells:
        if cell not in (off, "1"):
            rule = "an attribute must be -1 or 1" if off == "-1" else "an attribute must be 0 or 1, or -1 or 1"
            raise ShardError(f"{path}: line {line}: {name}: {column} is {cell or 'empty'}; {rule}")
    return np.array([cell == "1" for _, _, cell in cells], np.uint8)


def _split(path: Path, cells: Sequence[tuple[int, str]]) -> np.ndarray:
    values = SPLIT_NAMES | {str(value): value for value in SPLIT_NAMES.values()}
    for line, cell in cells:
        if cell.lower() not in values:
            raise ShardError(f"{path}: line {line}: split is {cell or 'empty'}; it must be train, valid or test")
    return np.array([values[cell.lower()] for _, cell in cells], np.int8)
