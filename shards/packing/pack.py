"""Packing a source into WebDataset tars, arrays and a manifest.

Everything written is a function of the source and the options alone: packing twice, with another number of workers, or
in several attempts or parts gives the same bytes. Shards are planned first and written in parallel, each under a
temporary name until it is whole, then recorded; the manifest comes last.

Parts may be packed by any hosts that share the directory. They neither talk nor lock, since not every network file
system has locks: each writes shards that are its own, and whoever then finds a record of every shard has come last and
writes the manifest. Where two find that at once, both write the same.
"""

import time
from pathlib import Path

import numpy as np

from shards import image, manifest, parallel
from shards.files import replacing
from shards.manifest import ARRAYS, File, Manifest, ShardError, Split
from shards.packing import destination
from shards.packing.plan import MEGABYTE, WHOLE, Options, Part, Plan, plan, tar_name
from shards.packing.writer import Job, Record, read_record, record_path, write_shard
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
    found = pack_part(planned, dst, WHOLE, workers=workers, quiet=quiet)
    assert found is not None  # the only part comes last
    return found


def pack_part(
    planned: Plan, dst: Path, part: Part, *, workers: int | None = None, quiet: bool = False
) -> Manifest | None:
    """Write one part of the set while others may write theirs, in any order; None until all are there. Else as `pack`.

    ShardError also where the other parts are there, but were not packed from what this one sees.
    """
    if workers is not None and workers < 1:
        raise ShardError(f"{dst}: {workers} workers cannot pack; at least one must")
    if (dst / manifest.NAME).exists():
        return destination.keep(manifest.read(dst), planned, quiet, deep=part.index == 0)
    jobs = [_job(planned, dst, *shard) for shard in planned.shards]
    lacking = []
    try:
        destination.begin(dst, planned, jobs[part.slice])
        records = _write(planned, dst, part, jobs[part.slice], workers, quiet)
        lacking = _publish(planned, dst, part, jobs, records)
    except FileNotFoundError as error:
        destination.explain(error, dst)
    if not (dst / manifest.NAME).exists():
        _wait(dst, part, lacking, quiet)
        return None
    result = manifest.read(dst)
    destination.finish(result)
    if not quiet:
        counts = ", ".join(f"{name} {split.count:,}" for name, split in result.splits.items())
        print(f"{dst}: complete, {counts}; manifest {result.digest}")
    return result


def _write(planned: Plan, dst: Path, part: Part, own: list[Job], workers: int | None, quiet: bool) -> list[Record]:
    """The shards of one part, and what is said about them."""
    start, counts = time.monotonic(), [len(job.numbers) for job in own]
    if not quiet:
        share = "" if part == WHOLE else f"part {part}, {sum(counts):,} of "
        what = f"{len(planned.source.numbers):,} images of {planned.source.place}"
        shards = f"{len(own)} shards" if part == WHOLE else f"{len(own)} of {len(planned.shards)} shards"
        print(f"packing {share}{what} into {shards} in {dst}", flush=True)
    results = parallel.each(write_shard, own, _worthwhile(planned) if workers is None else workers)
    records = list(parallel.shown(results, counts, "packed", quiet))
    if not quiet:
        seconds, megabytes = time.monotonic() - start, sum(record.shard.bytes for record in records) / MEGABYTE
        speed = f"{sum(counts) / seconds:,.0f} images/s, {megabytes / seconds:,.1f} MB/s"
        print(f"packed {sum(counts):,} images, {megabytes:,.1f} MB in {len(own)} shards: {speed}", flush=True)
    return records


def _publish(planned: Plan, dst: Path, part: Part, jobs: list[Job], own: list[Record]) -> list[Job]:
    """Writes the rest of the set if all shards are there; returns those that are not."""
    destination.require_same(dst, planned)  # parts that begin at once do not see each other's mark
    records: list[Record | None] = [None] * len(jobs)
    records[part.slice] = own
    # of the other parts' tars the size is enough: whoever wrote or found them has just looked at every byte
    records = [record or read_record(job, deep=False) for job, record in zip(jobs, records, strict=True)]
    found = [record for record in records if record is not None]
    if len(found) == len(jobs):
        manifest.write(_describe(planned, dst, found))
    return [job for job, record in zip(jobs, records, strict=True) if record is None]


def _wait(dst: Path, part: Part, lacking: list[Job], quiet: bool) -> None:
    """Says what other parts have yet to write; ShardError if they have, but something else."""
    # in this order: where there is no record yet, the other part writes it before it looks for this one's
    wrong = [job for job in lacking if record_path(job.path).exists() and read_record(job, deep=False) is None]
    if len(wrong) == len(lacking):
        why = f"not packed from the images and labels that part {part} sees, or damaged since"
        cure = "show all parts the same, with the same times of change, and pack again"
        raise ShardError(f"{lacking[0].path}: {why}, and so are {len(lacking) - 1} others; {cure}")
    if not quiet:
        print(f"{dst}: {len(lacking)} shards are not there yet; whichever part comes last finishes the set")


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
