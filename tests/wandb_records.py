"""Reads back the .wandb files that an offline run leaves: what `wandb sync` would upload."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768  # a LevelDB log: blocks of chunks, each with a header of crc32, length and kind
FULL, LAST = 1, 4


@dataclass
class Logged:
    """One .wandb file."""

    id: str = ""
    name: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    step_metrics: dict[str, str] = field(default_factory=dict)  # metric or pattern -> its x axis
    exit_code: int | None = None


def logged(run: Path) -> list[Logged]:
    """What every offline segment of the run directory `run` holds, oldest first."""
    return [_read(path) for path in sorted((run / "wandb").glob("offline-run-*/*.wandb"))]


def _read(path: Path) -> Logged:
    result = Logged()
    for record in _records(path.read_bytes()):
        match record.WhichOneof("record_type"):
            case "run":
                run = record.run
                result.id, result.name, result.group = run.run_id, run.display_name, run.run_group
                result.tags = list(run.tags)
                result.config |= {item.key: json.loads(item.value_json) for item in run.config.update}
            case "history":
                items = record.history.item
                result.rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
            case "metric":
                metric = record.metric
                result.step_metrics[metric.name or metric.glob_name] = metric.step_metric
            case "exit":
                result.exit_code = record.exit.exit_code
    return result


def _records(data: bytes) -> Iterator[Record]:
    position, whole = 7, b""  # after the file's own header
    while position + 7 <= len(data):
        left = BLOCK - position % BLOCK
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if left < 7 or kind == 0:  # the padding at a block's end
            position += left
            continue
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (FULL, LAST):
            yield Record.FromString(whole)
            whole = b""
