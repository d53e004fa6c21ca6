"""The rows of a run as its metrics.jsonl keeps them, one JSON object a line, read also while it is written."""

import json
from pathlib import Path
from typing import Any

from vaedist.config import ConfigError

Row = dict[str, Any]


def lines(path: Path) -> list[bytes]:
    """Every line that is whole: the last one may be half written, or the disk was full."""
    found = path.read_bytes().splitlines(keepends=True)
    return found[:-1] if found and not found[-1].endswith(b"\n") else found


def parsed(line: bytes, where: str) -> Row:
    """A row with whole numbers for `step` and `seen`. Raises ConfigError, which names `where`."""
    try:
        row = json.loads(line)
        return row | {"step": int(row["step"]), "seen": int(row["seen"])}
    except (ValueError, KeyError, TypeError, OverflowError):
        raise ConfigError(f"{where}: is not a row with a step and images seen: move the file away") from None


def read(path: Path) -> list[Row]:
    """All rows that are whole. Raises ConfigError or OSError."""
    return [parsed(line, f"{path}:{number}") for number, line in enumerate(lines(path), 1)]
