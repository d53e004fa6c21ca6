"""Reading one annotation file: rows `image value ...`, as .txt or .csv, after an optional count and header."""

import hashlib
import re
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from shards.manifest import ShardError

IMAGE_NAME = re.compile(r"(\d{1,9})\.jpg")


@dataclass(frozen=True, kw_only=True)
class Format:
    """An annotation file: its base name and what its values are. Without columns, the file's own header names them."""

    base: str
    dtype: np.dtype[Any]
    columns: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = (".txt", ".csv")


@dataclass(frozen=True, kw_only=True)
class RawTable:
    """What an annotation file says, in its own order."""

    path: Path
    sha256: str
    first_line: int  # of the first row, counted from 1
    columns: tuple[str, ...]
    names: list[str]
    values: np.ndarray  # [n, columns]

    def require(self, good: np.ndarray, rule: str) -> None:
        """ShardError naming file, line, image and value of the first entry of `good` [n, columns] that is False."""
        bad = np.argwhere(~good)
        if len(bad):
            row, column = bad[0]
            value = f"{self.columns[column]} is {self.values[row, column]}"
            raise ShardError(f"{self.path}: line {self.first_line + row}: {self.names[row]}: {value}; {rule}")

    def require_same(self, names: list[str], other: Path) -> None:
        """ShardError unless this file names the same images as `names`, those of the file `other`, each once."""
        own = set(self.names)
        if len(own) < len(self.names):
            again = Counter(self.names).most_common(1)[0][0]
            raise ShardError(f"{self.path}: {again} is listed more than once")
        for lacking, complete, missing in (
            (self.path, other, set(names) - own),
            (other, self.path, own - set(names)),
        ):
            if missing:
                which = f"{len(missing)} of the images in {complete.name}, the first is {min(missing)}"
                raise ShardError(f"{lacking}: lacks {which}")

    def rows(self, names: Sequence[str]) -> np.ndarray:
        """int64 [n]: the row of each name."""
        row = {name: i for i, name in enumerate(self.names)}
        return np.array([row[name] for name in names], np.int64)


def read_table(path: Path, form: Format) -> RawTable:
    """Parse one annotation file: an optional count, an optional header, then rows `name value ...`."""
    data = path.read_bytes()
    refuse_web_page(path, data)
    try:
        lines = data.decode("utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError:
        raise ShardError(f"{path}: not a text file; download it again") from None
    separator = "," if any("," in line for line in lines[:3]) else None
    rows = [[cell.strip() for cell in line.split(separator)] or [""] for line in lines]

    start, declared, columns = 0, None, form.columns
    if rows and len(rows[0]) == 1 and rows[0][0].isdecimal():
        declared, start = int(rows[0][0]), 1
    if len(rows) > start and not IMAGE_NAME.fullmatch(rows[start][0]):
        header, start = rows[start], start + 1
        named = len(rows) > start and len(header) == len(rows[start])  # the first column has a name too: image_id
        columns = tuple(header[1:] if named else header)
    if len(rows) == start:
        raise ShardError(f"{path}: lists no images")
    if form.columns and len(columns) != len(form.columns):
        raise ShardError(f"{path}: {len(columns)} columns where {form.base} has {len(form.columns)}")
    if not columns or len(set(columns)) < len(columns):
        raise ShardError(f"{path}: line {start}: the columns must have names, each another")
    if declared is not None and declared != len(rows) - start:
        raise ShardError(f"{path}: line 1 declares {declared} images, but {len(rows) - start} follow")
    values = _numbers(path, rows, start, len(columns), form.dtype)
    return RawTable(
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        first_line=start + 1,
        columns=columns,
        names=[row[0] for row in rows[start:]],
        values=values,
    )


def _numbers(path: Path, rows: list[list[str]], start: int, columns: int, dtype: np.dtype[Any]) -> np.ndarray:
    """The values of rows[start:] as [n, columns] of `dtype`."""

    def fail(i: int, why: str) -> NoReturn:
        raise ShardError(f"{path}: line {i + 1}: {why}")

    number = float if dtype.kind == "f" else int
    parsed = []
    for i in range(start, len(rows)):
        row = rows[i]
        if not IMAGE_NAME.fullmatch(row[0]):
            fail(i, f"{row[0]!r} is not an image name such as 000001.jpg")
        if len(row) != columns + 1:
            fail(i, f"{row[0]}: {len(row) - 1} values where {columns} are expected")
        try:
            parsed.append(list(map(number, row[1:])))
        except ValueError as error:
            fail(i, f"{row[0]}: a value is not a number ({error})")
    wide = np.array(parsed, dtype=np.float64)  # exact for every integer an annotation can hold
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    bad = np.argwhere(~((wide >= limits.min) & (wide <= limits.max)))
    if len(bad):
        row, column = bad[0]
        fail(start + row, f"{rows[start + row][0]}: {rows[start + row][1 + column]} is out of range")
    return wide.astype(dtype)


def present(place: Path, names: list[str], found: Container[str], allow_missing: bool) -> list[str]:
    """Those of `names` that are found in a place; ShardError if that is not all and may not be less."""
    missing = [name for name in names if name not in found]
    if missing and (len(missing) == len(names) or not allow_missing):
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        cure = "get them, or pack the others with --allow-missing" if len(missing) < len(names) else "get them"
        raise ShardError(f"{place}: {len(missing):,} of {len(names):,} images are missing: {some}; {cure}")
    return [name for name in names if name in found]


def refuse_web_page(path: Path, data: bytes) -> None:
    """ShardError if a file that was downloaded begins like HTML."""
    if data[:64].lstrip().startswith(b"<"):
        why = "Google Drive answers so when its download quota is spent"
        raise ShardError(f"{path}: a web page, not the file itself ({why}); download it again")
