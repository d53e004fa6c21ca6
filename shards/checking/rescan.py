"""Checking that a tar which somebody else has made still says what it said when it was indexed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shards.checking.tars import Samples, faults
from shards.foreign import index
from shards.foreign.contents import Scan
from shards.foreign.described import IMAGE
from shards.manifest import ARRAYS


def rescan_faults(job: Samples) -> list[str]:
    """How the keys, the places and the texts of the samples of a tar differ from the arrays, one line each."""
    return faults(job, _faults)


def _faults(job: Samples, path: Path) -> Iterator[str]:
    scan = index.scan(str(path), job.manifest.source.get(IMAGE))
    if len(scan.index) != len(job.index):
        yield f"{len(scan.index):,} samples where the index has {len(job.index):,}"
        return
    good = np.ones(len(scan.index), bool)
    for field in ("offset", "length", "crc32"):
        good &= scan.index[field] == job.index[field]
    good &= np.array([key.decode("utf-8", "surrogateescape") for key in scan.keys.tolist()]) == np.array(job.keys)
    yield from (f"sample {job.keys[i]}: the tar has another here, or elsewhere" for i in np.flatnonzero(~good))
    tables = _tables(job, scan)
    for entry, array in job.arrays.items():
        same = (tables[entry] == array).reshape(len(array), -1).all(axis=1) if entry in tables else np.zeros(len(array))
        yield from (
            f"sample {job.keys[i]}: the tar and {ARRAYS[entry]}.npy disagree about {entry}"
            for i in np.flatnonzero(same == 0)
        )


def _tables(job: Samples, scan: Scan) -> dict[str, np.ndarray]:
    """What the texts of the tar say, in the form of the arrays."""
    if scan.told is not None:
        return {entry: table.values for entry, table in scan.told[1].items() if _fits(table.values, job, entry)}
    if (scan.classes < 0).any():
        return {}
    classes = np.arange(len(job.manifest.attributes))
    return {"attributes": (scan.classes[:, None] == classes).astype(np.uint8)}


def _fits(values: np.ndarray, job: Samples, entry: str) -> bool:
    return entry in job.arrays and values.shape == job.arrays[entry].shape
