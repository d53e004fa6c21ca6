"""Damage to a packed set."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from shards import manifest
from shards.manifest import File, Manifest


def flip(path: Path, at: int) -> None:
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def republish(found: Manifest, split: str, name: str, array: np.ndarray) -> None:
    """Write another array and a manifest that agrees with it: only looking at the samples can show the fault."""
    path = found.directory / found.splits[split].arrays[name].name
    np.save(path, array)
    data = path.read_bytes()
    file = File(name=path.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    changed = replace(found.splits[split], arrays=found.splits[split].arrays | {name: file})
    manifest.write(replace(found, splits=found.splits | {split: changed}))
