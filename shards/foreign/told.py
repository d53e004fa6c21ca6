"""What the texts beside foreign images say: the json of a sample in the form of this program, and class numbers."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from shards.sources import Table

DTYPES: dict[str, np.dtype[Any]] = {  # keys as in manifest.ARRAYS
    "attributes": np.dtype(np.uint8),
    "identity": np.dtype(np.int32),
    "landmarks": np.dtype(np.int16),
    "bbox": np.dtype(np.int32),
    "factors": np.dtype(np.float32),
}
Told = tuple[int, dict[str, Table]]  # image_id and one row of every table


def parse(text: bytes) -> Told | None:
    """The json of one sample; None unless `writer.describe_sample` could have written it."""
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(told, dict) or type(told.get("image_id")) is not int or not 0 <= told["image_id"] < 2**32:
        return None
    try:
        return told["image_id"], {
            entry: _row(entry, told[entry], dtype) for entry, dtype in DTYPES.items() if entry in told
        }
    except (ValueError, TypeError, OverflowError):
        return None


def _row(entry: str, told: Any, dtype: np.dtype[Any]) -> Table:
    """One row of a table; ValueError, TypeError or OverflowError if it is none."""
    columns = () if entry == "identity" else tuple(told.keys()) if isinstance(told, dict) else None
    if columns is None:
        raise ValueError
    plain = list(told.values()) if columns else told
    values, exact = np.array(plain, dtype), np.array(plain, np.float64)
    numbers = values.ndim == bool(columns) and (dtype.kind == "f" or np.array_equal(values, exact))
    if not numbers or (entry == "attributes" and (values > 1).any()):
        raise ValueError
    return Table(columns=columns, values=values)


def stack(rows: Sequence[Told | None]) -> tuple[np.ndarray, dict[str, Table]] | None:
    """(numbers [n], tables of n rows) of n samples; None unless all say the same kinds of things and one at all."""
    first = rows[0]
    if first is None or not first[1]:
        return None
    form = _form(first)
    if any(row is None or _form(row) != form for row in rows):
        return None
    good = [row for row in rows if row is not None]
    tables = {
        entry: Table(columns=table.columns, values=np.stack([row[1][entry].values for row in good]))
        for entry, table in first[1].items()
    }
    return np.array([number for number, _ in good], np.uint32), tables


def join(parts: Sequence[tuple[np.ndarray, dict[str, Table]] | None]) -> tuple[np.ndarray, dict[str, Table]] | None:
    """What `stack` has made of several tars as one; None unless all of them fit together."""
    good = [part for part in parts if part is not None]
    if len(good) < len(parts) or any(_form(part) != _form(good[0]) for part in good):
        return None
    tables = {
        entry: Table(columns=table.columns, values=np.concatenate([tables[entry].values for _, tables in good]))
        for entry, table in good[0][1].items()
    }
    return np.concatenate([numbers for numbers, _ in good]), tables


def _form(told: tuple[Any, dict[str, Table]]) -> list[tuple[str, tuple[str, ...]]]:
    return [(entry, table.columns) for entry, table in told[1].items()]


def one_hot(classes: np.ndarray) -> Table:
    """uint8 [n, classes] of class numbers [n], with a column class_0, class_1, ... for every number up to the most."""
    count = int(classes.max()) + 1
    return Table(
        columns=tuple(f"class_{number}" for number in range(count)),
        values=(classes[:, None] == np.arange(count)).astype(np.uint8),
    )
