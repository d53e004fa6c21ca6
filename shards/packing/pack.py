"""Packing a source into WebDataset tars, arrays and a manifest.

Everything written is a function of the source and the options alone: packing twice, with another number of workers, or
in several attempts gives the same bytes. Shards are planned first and written in parallel, each under a temporary name
until it is whole, then recorded; the manifest comes last.
"""

import time
from pathlib import Path

import numpy as np

from shards import image, manifest, parallel
from shards.files import replacing
from shards.manifest import ARRAYS, File, Manifest, ShardError, Split
from shards.packing import destination
from shards.packing.plan import MEGABYTE, Options, Plan, plan, tar_name
from shards.packing.writer import Job, Record, write_shard
from shards.sources import celeba, faces

DEFAULT = Options()
FACES = Options(shard_mb=2)  # seconds of drawing: what a kill loses, and the pace of the display


def pack_celeba(
    src: Path,
    dst: Path,
    *,
    name: str = "celeba",
    options: Options = DEFAULT,
    allow_missing: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> Manifest:
    """Pack CelebA found below `src` into `dst`; see `pack` and `celeba.read`."""
    source = celeba.read(Path(src), allow_missing=allow_missing)
    return pack(plan(name, source, options), Path(dst), workers=workers, quiet=quiet)


def pack_faces(
    dst: Path,
    *,
    count: int,
    seed: int = 0,
    options: Options = FACES,
    workers: int | None = None,
    quiet: bool = False,
) -> Manifest:
    """Draw `count` faces into `dst`; a `dst` that already holds them is left alone. For the rest see `pack`."""
    return pack(plan("faces", faces.source(count, seed), options), Path(dst), workers=workers, quiet=quiet)


def pack(planned: Plan, dst: Path, *, workers: int | None = None, quiet: bool = False) -> Manifest:
    """Write the set; a `dst` that already holds exactly this is left as it is, an interrupted pack goes on.

    workers: processes, by default one a core. ShardError on any fault of the source, and where `dst` holds something
    else or was begun with other options.
    """
    source = planned.source
    if workers is not None and workers < 1:
        raise ShardError(f"{dst}: {workers} workers cannot pack; at least one must")
    if (dst / manifest.NAME).exists():
        return destination.keep(manifest.read(dst), planned, quiet)
    start = time.monotonic()
    jobs = [_job(planned, dst, *shard) for shard in planned.shards]
    with destination.unfinished(dst, planned):
        if not quiet:
            what = f"{len(source.numbers):,} images of {source.place}"
            print(f"packing {what} into {len(jobs)} shards in {dst}", flush=True)
        counts = [len(job.numbers) for job in jobs]
        results = parallel.each(write_shard, jobs, _worthwhile(planned) if workers is None else workers)
        records = list(parallel.shown(results, counts, "packed", quiet))
        result = manifest.write(_describe(planned, dst, records))
    if not quiet:
        _summarise(result, time.monotonic() - start)
    return result


def _worthwhile(planned: Plan) -> int:
    """Processes: one a core, but to copy bytes only one for every shard's worth, since its start costs as long."""
    source, options = planned.source, planned.options
    worth = int(source.bytes.sum()) // options.shard_bytes + 1
    return min(parallel.cores(), worth) if options.npy is None and not source.drawn else parallel.cores()


def _job(planned: Plan, dst: Path, split: str, number: int, rows: np.ndarray) -> Job:
    source, options = planned.source, planned.options
    return Job(
        path=dst / tar_name(split, number),
        number=number,
        place=source.place,
        images=source.images.part(rows),
        numbers=source.numbers[rows],
        tables={entry: table.rows(rows) for entry, table in source.tables.items()},
        npy=options.npy,
        crop=options.crop,
    )


def _describe(planned: Plan, dst: Path, records: list[Record]) -> Manifest:
    """The manifest of a set whose tars are written; writes the arrays."""
    source = planned.source
    rows = np.concatenate([rows for _, _, rows in planned.shards])
    checks = np.empty(len(rows), records[0].checks.dtype)
    checks[rows] = np.concatenate([record.checks for record in records])
    images = destination.images_digest(source.images.names, checks["bytes"].tolist(), checks["crc32"].tolist())
    sizes = {size for record in records for size in record.sizes}
    height, width = ({size[axis] for size in sizes} for axis in (0, 1))
    suffixes = sorted({suffix for record in records for suffix in record.suffixes})
    return Manifest(
        directory=dst,
        digest="",
        name=planned.name,
        encoding=", ".join(suffix[1:] for suffix in suffixes),
        height=height.pop() if len(height) == 1 else None,
        width=width.pop() if len(width) == 1 else None,
        smallest=min(min(size[:2]) for size in sizes),
        channels=max(size[2] for size in sizes),
        scaled=planned.options.npy is not None,
        crop=planned.options.crop,
        attributes=source.tables["attributes"].columns if "attributes" in source.tables else (),
        factors=source.factors,
        splits=_save_arrays(planned, dst, records),
        source=source.digests | {"images": images},
    )


def _save_arrays(planned: Plan, dst: Path, records: list[Record]) -> dict[str, Split]:
    splits = {}
    for split, rows in planned.rows.items():
        own = [record for (name, _, _), record in zip(planned.shards, records, strict=True) if name == split]
        arrays = {"index": np.concatenate([record.index for record in own])}
        tables = planned.source.tables.items()
        arrays |= {ARRAYS[entry]: table.values[rows] for entry, table in tables if entry in ARRAYS}
        files = {key: _save(dst / f"{split}.{key}.npy", array) for key, array in arrays.items()}
        splits[split] = Split(count=len(rows), shards=tuple(record.shard for record in own), arrays=files)
    return splits


def _save(path: Path, array: np.ndarray) -> File:
    with replacing(path) as stream:
        stream.write(image.to_npy(array))  # np.save(stream) would hide why a full disk refuses
    return manifest.describe(path)


def _summarise(result: Manifest, seconds: float) -> None:
    shards = [shard for split in result.splits.values() for shard in split.shards]
    images, megabytes = sum(shard.count for shard in shards), sum(shard.bytes for shard in shards) / MEGABYTE
    counts = ", ".join(f"{name} {split.count:,}" for name, split in result.splits.items())
    speed = f"{images / seconds:,.0f} images/s, {megabytes / seconds:,.1f} MB/s"
    size = f"{megabytes:,.1f} MB in {len(shards)} shards"
    print(f"packed {images:,} images ({counts}), {size}: {speed}; manifest {result.digest}")
