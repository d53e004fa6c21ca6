"""Making files of a set again: tars from what they were packed from, arrays from the tars."""

from collections.abc import Collection
from pathlib import Path

import numpy as np

from shards import image, parallel
from shards.checking.origin import not_the_source
from shards.checking.tars import Tar, local, tars
from shards.files import replacing
from shards.foreign import described, index, told
from shards.foreign.contents import Scan
from shards.foreign.places import Place
from shards.manifest import ARRAYS, INDEX, SPLITS, File, Manifest, ShardError
from shards.packing.writer import Job, write_shard
from shards.sources import Source


def write_tars(
    found: Manifest, names: Collection[str], source: Source, target: Path, *, workers: int | None, quiet: bool
) -> None:
    """Write the tars of these names into `target`. ShardError unless they get the sha256 of the manifest."""
    jobs, shards = [], []
    for name, split in found.splits.items():
        numbers = _numbers(found, name, source)
        ends = np.cumsum([shard.count for shard in split.shards])
        for number, (shard, end) in enumerate(zip(split.shards, ends.tolist(), strict=True)):
            if shard.name in names:
                own = numbers[end - shard.count : end]
                jobs.append(_job(found, source, target / shard.name, number, own))
                shards.append(shard)
    results = parallel.each(write_shard, jobs, min(parallel.cores() if workers is None else workers, len(jobs)))
    counts = [shard.count for shard in shards]
    for shard, record in zip(shards, parallel.shown(results, counts, "packed", quiet), strict=True):
        if record.shard.sha256 != shard.sha256:
            raise not_the_source(source.place, f"{shard.name} becomes another")


def _numbers(found: Manifest, name: str, source: Source) -> np.ndarray:
    """The numbers of the images of a split, in the order of its samples: by its index, however damaged, if that may be.

    Else as if it had been packed without --shuffle. Either way the sha256 of the tars will show.
    """
    split = found.splits[name]
    try:
        index = np.load(found.directory / split.arrays["index"].name, allow_pickle=False)
        if index.dtype == INDEX and len(index) == split.count:
            return index["image"].astype(np.int64)
    except (OSError, ValueError):
        pass
    expected = source.numbers[source.split == SPLITS.index(name)]
    if len(expected) != split.count:
        raise not_the_source(source.place, f"{len(expected):,} images of {name} where {split.count:,} were packed")
    return expected


def _job(found: Manifest, source: Source, path: Path, number: int, numbers: np.ndarray) -> Job:
    rows = np.minimum(np.searchsorted(source.numbers, numbers), len(source.numbers) - 1)
    if lacking := numbers[source.numbers[rows] != numbers].tolist():
        raise not_the_source(source.place, f"{len(lacking):,} images of {path.name} are missing, as {lacking[0]:06d}")
    return Job(
        path=path,
        number=number,
        place=source.place,
        images=source.images.part(rows),
        numbers=source.numbers[rows],
        tables={entry: table.rows(rows) for entry, table in source.tables.items()},
        npy=found.height if found.scaled else None,
        crop=found.crop,
    )


def write_arrays(found: Manifest, names: Collection[str], target: Path) -> None:
    """Write the arrays of these names into `target`, from the tars there or else in the set. ShardError as above."""
    places = tars(found)
    scans = [_scan(found, tar, target) for tar in places]
    foreign = any("keys" in split.arrays for split in found.splits.values())
    arrays = _foreign(places, scans) if foreign else _own(found, places, scans)
    for split, own in found.splits.items():
        for key, file in own.arrays.items():
            if file.name in names:
                if key not in arrays[split]:
                    raise ShardError(f"{file.name}: cannot be made from the tars; --from the URL of a copy")
                _write(target, file, arrays[split][key])


def _scan(found: Manifest, tar: Tar, target: Path) -> Scan:
    wanted = found.source.get(described.IMAGE)
    remade = target / tar.shard.name
    if remade.exists():
        return index.scan(str(remade), wanted)
    with local(tar) as path:
        return index.scan(str(path), wanted)


def _foreign(places: list[Tar], scans: list[Scan]) -> dict[str, dict[str, np.ndarray]]:
    given = [
        Place(split=tar.parts[0][0], location=str(tar.path), name=tar.shard.name, url=tar.shard.url, bytes=None)
        for tar in places
    ]
    return described.arrays(given, scans)


def _own(found: Manifest, places: list[Tar], scans: list[Scan]) -> dict[str, dict[str, np.ndarray]]:
    arrays = {}
    for split in found.splits:
        own = [scan for tar, scan in zip(places, scans, strict=True) if tar.parts[0][0] == split]
        joined = np.concatenate([scan.index for scan in own])
        joined["shard"] = np.repeat(np.arange(len(own)), [len(scan.index) for scan in own])
        joined["image"] = np.concatenate([scan.keys.astype(np.int64) for scan in own])
        tables = told.join([scan.told for scan in own])
        arrays[split] = {"index": joined}
        if tables is not None:
            arrays[split] |= {ARRAYS[entry]: table.values for entry, table in tables[1].items()}
    return arrays


def _write(target: Path, file: File, array: np.ndarray) -> None:
    with replacing(target / file.name) as stream:
        stream.write(image.to_npy(array))
