"""Checking a set against its manifest: every file, with `deep` every sample, with `stock` by another program."""

import hashlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from shards import manifest, parallel
from shards.checking.deep import sample_faults
from shards.checking.rescan import rescan_faults
from shards.checking.stock import stock_faults
from shards.checking.tars import Samples, Tar, local, samples, tars
from shards.manifest import INDEX, File, Manifest, ShardError
from shards.packing.plan import MEGABYTE

PART = 2_000  # samples of one job, so that progress moves


def verify(
    directory: Path | str, *, deep: bool = False, stock: bool = False, workers: int | None = None, quiet: bool = False
) -> list[str]:
    """Every fault of a set, one line each; an empty list means it is sound. ShardError if its manifest is unreadable.

    Size and sha256 of every file, of those behind URLs too; with `deep` also, for every sample, the tar headers, the
    crc32, whether it decodes to the right size, and whether its texts say what the arrays say; with `stock` also
    whether the webdataset package, as anybody would use it, reads the same keys, members and bytes.
    """
    found = manifest.read(directory)
    damaged = bad_files(found, workers=workers, quiet=quiet)
    faults = list(damaged.values())
    listed = {tar.shard.name for tar in tars(found)}
    strays = sorted(path.name for path in found.directory.glob("*.tar") if path.name not in listed)
    faults += [f"{name}: not in the manifest, yet a reader of *.tar would take it" for name in strays]
    if deep:
        faults += [fault for name in found.splits for fault in _array_faults(found, name, damaged)]
        jobs = _jobs(found, damaged)
        # a tar behind a URL is fetched for every job
        parts = [part for job in jobs for part in ([job] if job.tar.url is not None else job.parts(PART))]
        faults += _each(sample_faults, parts, workers, quiet, "decoded", 5_000)
        faults += _each(rescan_faults, [job for job in jobs if job.foreign], workers, quiet, "read again", 20_000)
    if stock and not damaged:
        faults += _each(stock_faults, _jobs(found, damaged), workers, quiet, "read by webdataset", 50_000)
    return faults


def bad_files(found: Manifest, *, workers: int | None = None, quiet: bool = False) -> dict[str, str]:
    """By their names, the files that are missing or have other bytes than the manifest says, and what is wrong."""
    arrays = [file for split in found.splits.values() for file in split.arrays.values()]
    jobs: list[File | Tar] = [*arrays, *tars(found)]
    sizes = [(job if isinstance(job, File) else job.shard).bytes // MEGABYTE for job in jobs]

    def check(job: File | Tar) -> tuple[str, str | None]:
        if isinstance(job, File):
            return job.name, _file_fault(found.directory / job.name, job)
        return job.shard.name, _tar_fault(job)

    with ThreadPoolExecutor(parallel.cores() if workers is None else workers) as pool:  # hashing lets go of the GIL
        results = parallel.shown(pool.map(check, jobs), sizes, "hashed", quiet, unit="MB")
        return {name: fault for name, fault in results if fault is not None}


def _file_fault(path: Path, file: File) -> str | None:
    if not path.is_file():
        return f"{file.name}: missing"
    size = path.stat().st_size
    if size != file.bytes:
        return f"{file.name}: {size} bytes where the manifest says {file.bytes}"
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return None if digest == file.sha256 else f"{file.name}: its sha256 is not the one in the manifest"


def _tar_fault(tar: Tar) -> str | None:
    if tar.url is None:
        return _file_fault(tar.path, tar.shard)
    try:
        with local(tar):
            return None
    except ShardError as error:
        return f"{tar.shard.name}: {error}"


def _array_faults(found: Manifest, name: str, damaged: Collection[str]) -> Iterator[str]:
    """What is wrong with the arrays of a split whose files are as the manifest says."""
    split = found.splits[name]
    files = {key: file.name for key, file in split.arrays.items()}
    if files["index"] in damaged:
        yield f"{files['index']}: the samples of {name} cannot be found without it"
    else:
        yield from _index_faults(found, name, files["index"])
    if "labels" in files and files["labels"] not in damaged:
        labels = found.array(name, "labels")
        good = np.all(labels <= 1, axis=1) if labels.shape[1:] == (len(found.attributes),) else None
        yield from _row_faults(found, name, files["labels"], good, "a label is neither 0 nor 1")
    if "factors" in files and files["factors"] not in damaged:
        yield from _factor_faults(found, name, files["factors"])


def _index_faults(found: Manifest, name: str, file: str) -> Iterator[str]:
    split, index = found.splits[name], found.array(name, "index")
    if index.dtype != INDEX:
        yield f"{file}: dtype {index.dtype} where the format has {INDEX}"
        return
    # what is out of range counts as one more shard, and does not make room for billions of them
    shard = np.minimum(index["shard"], len(split.shards)).astype(np.int64)
    *counts, strange = np.bincount(shard, minlength=len(split.shards) + 1).tolist()
    if strange or counts != [shard.count for shard in split.shards]:
        yield f"{file}: {counts} samples in the shards where the manifest says {[s.count for s in split.shards]}"
    if not np.array_equal(index["shard"], np.sort(index["shard"])):
        yield f"{file}: its shards are out of order"


def _factor_faults(found: Manifest, name: str, file: str) -> Iterator[str]:
    factors = found.array(name, "factors")
    if factors.shape[1:] != (len(found.factors),):
        yield from _row_faults(found, name, file, None, "")
        return
    for column, factor in enumerate(found.factors):
        value = factors[:, column]
        good = np.isin(value, np.array(factor.values, np.float32)) if factor.values else np.isfinite(value)
        what = f"none of its {len(factor.values)} values" if factor.values else "no number"
        yield from _row_faults(found, name, file, good, f"{factor.name} has {what}")


def _row_faults(found: Manifest, name: str, file: str, good: np.ndarray | None, fault: str) -> Iterator[str]:
    """A line for every row that is not good [n]; good None: the array does not have a column for every name."""
    if good is None:
        yield f"{file}: not as many columns as the manifest has names"
    else:
        yield from (f"{file}: sample {found.key(name, int(row))}: {fault}" for row in np.flatnonzero(~good))


def _jobs(found: Manifest, damaged: Collection[str]) -> list[Samples]:
    """The samples of the tars that are here, or behind a URL, and whose index is sound."""
    lost = {
        name
        for name, split in found.splits.items()
        if split.arrays["index"].name in damaged or found.array(name, "index").dtype != INDEX
    }
    return [
        samples(found, tar, damaged)
        for tar in tars(found)
        if not lost.intersection(name for name, _ in tar.parts) and (tar.url is not None or tar.path.is_file())
    ]


def _each(
    check: Callable[[Samples], list[str]], jobs: list[Samples], workers: int | None, quiet: bool, verb: str, worth: int
) -> list[str]:
    """What `check` finds in all jobs. worth: samples for which a process is started."""
    counts = [len(job.index) for job in jobs]
    processes = min(parallel.cores() if workers is None else workers, sum(counts) // worth + 1)
    results = parallel.each(check, jobs, processes)
    return [fault for part in parallel.shown(results, counts, verb, quiet) for fault in part]
