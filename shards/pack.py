"""Packing CelebA, or a drawn set in CelebA's layout, into WebDataset tars, arrays and a manifest.

Everything written is a function of the images, the annotations and the shard size alone: packing twice, or with another
number of workers, gives the same bytes. Shards are planned first and written in parallel, each under a temporary name
until it is whole; the manifest comes last.
"""

import hashlib
import math
import shutil
import time
import zlib
from pathlib import Path

import numpy as np

from shards import celeba, destination, faces, jpeg, manifest, parallel
from shards.celeba import Celeba, Image
from shards.files import replacing
from shards.manifest import ARRAYS, SPLITS, File, Manifest, Shard, ShardError, Split
from shards.writer import Job, plan, write_shard

MEGABYTE = 10**6


def pack_celeba(
    src: Path, dst: Path, *, name: str = "celeba", shard_mb: float = 64, workers: int | None = None, quiet: bool = False
) -> Manifest:
    """Pack CelebA found below `src` into `dst`; a `dst` that already holds exactly this is left as it is.

    shard_mb: size of a shard in 10^6 bytes, about. workers: processes, by default one a core. ShardError on any fault
    of the source, and where `dst` holds something else.
    """
    dst, shard_bytes = Path(dst), _shard_bytes(shard_mb)
    return _pack(celeba.read(Path(src)), dst, name, {}, shard_bytes, workers, quiet)


def pack_faces(
    dst: Path, *, count: int, seed: int = 0, workers: int | None = None, shard_mb: float = 64, quiet: bool = False
) -> Manifest:
    """Draw `count` faces and pack them into `dst` as one packs CelebA; a `dst` that already holds them is left alone.

    The drawings lie in a hidden folder beside `dst` meanwhile. For the rest see `pack_celeba`.
    """
    dst, shard_bytes = Path(dst).resolve(), _shard_bytes(shard_mb)
    generator = {"generator": "faces", "count": str(count), "seed": str(seed)}
    if (dst / manifest.NAME).exists():
        found = manifest.read(dst)
        same = generator.items() <= found.source.items()
        difference = None if same else "it was not drawn with this count and seed"
        return destination.keep(found, difference, shard_bytes, quiet)
    destination.require_free(dst)
    dst.parent.mkdir(parents=True, exist_ok=True)
    drawings = dst.with_name(f".{dst.name}.faces")
    if drawings.exists():
        shutil.rmtree(drawings)  # of an interrupted run
    try:
        faces.write_celeba(drawings, count=count, seed=seed, workers=workers, quiet=quiet)
        return _pack(celeba.read(drawings), dst, "faces", generator, shard_bytes, workers, quiet)
    finally:
        if drawings.exists():
            shutil.rmtree(drawings)


def _pack(
    data: Celeba,
    dst: Path,
    name: str,
    generator: dict[str, str],
    shard_bytes: int,
    workers: int | None,
    quiet: bool,
) -> Manifest:
    if (dst / manifest.NAME).exists():
        found = manifest.read(dst)
        return destination.keep(found, _difference(found, data, name), shard_bytes, quiet)
    start = time.monotonic()
    height, width = _first_size(data)
    rows = {split: np.flatnonzero(data.split == value) for value, split in enumerate(SPLITS)}
    rows = {split: which for split, which in rows.items() if len(which)}
    jobs = [job for split, which in rows.items() for job in _jobs(data, split, which, dst, shard_bytes, height, width)]
    # a process is worth starting for a shard's worth of bytes
    worthwhile = math.ceil(sum(image.bytes for image in data.images) / shard_bytes)
    processes = min(parallel.cores() if workers is None else workers, worthwhile)
    if not quiet:
        print(f"packing {len(data.images):,} images of {data.path} into {len(jobs)} shards in {dst}", flush=True)
    with destination.unfinished(dst):
        counts = [len(job.images) for job in jobs]
        written = list(parallel.shown(parallel.each(write_shard, jobs, processes), counts, "packed", quiet))
        splits, crcs = _save_arrays(data, dst, rows, written)
        result = manifest.write(
            Manifest(
                directory=dst,
                digest="",
                name=name,
                encoding="jpg",
                height=height,
                width=width,
                attributes=data.tables["attributes"].columns,
                factors=data.tables["factors"].columns if "factors" in data.tables else (),
                splits=splits,
                source=generator | data.digests | {"images": _digest(data.images, crcs)},
            )
        )
    if not quiet:
        _summarise(result, time.monotonic() - start)
    return result


def _first_size(data: Celeba) -> tuple[int, int]:
    try:
        return jpeg.dimensions(next(celeba.read_images(data.path, data.images[:1])))
    except ValueError as error:
        raise ShardError(f"{data.path}: {data.images[0].name} is {error}; get this image again") from None


def _jobs(
    data: Celeba, split: str, which: np.ndarray, dst: Path, shard_bytes: int, height: int, width: int
) -> list[Job]:
    sizes = np.array([data.images[i].bytes for i in which])
    return [
        Job(
            path=dst / f"{split}-{number:05d}.tar",
            number=number,
            source=data.path,
            images=[data.images[i] for i in which[part]],
            tables={entry: table.rows(which[part]) for entry, table in data.tables.items()},
            height=height,
            width=width,
        )
        for number, part in enumerate(plan(sizes, shard_bytes))
    ]


def _save_arrays(
    data: Celeba, dst: Path, rows: dict[str, np.ndarray], written: list[tuple[Shard, np.ndarray]]
) -> tuple[dict[str, Split], list[int]]:
    """Write the arrays of every split; returns the splits, and the crc32 of every image of the source."""
    splits, crcs = {}, np.zeros(len(data.images), np.uint32)
    for split, which in rows.items():
        own = [result for result in written if result[0].name.startswith(f"{split}-")]
        index = np.concatenate([part for _, part in own])
        crcs[which] = index["crc32"]
        arrays = {ARRAYS[entry]: table.rows(which).values for entry, table in data.tables.items()}
        files = {key: _save(dst / f"{split}.{key}.npy", array) for key, array in ({"index": index} | arrays).items()}
        splits[split] = Split(count=len(which), shards=tuple(shard for shard, _ in own), arrays=files)
    return splits, crcs.tolist()


def _save(path: Path, array: np.ndarray) -> File:
    with replacing(path) as stream:
        np.save(stream, array, allow_pickle=False)
    return manifest.describe(path)


def _digest(images: list[Image], crcs: list[int]) -> str:
    """One name for the contents of all images, the same for a folder and for an archive of them."""
    listing = "".join(f"{image.name} {image.bytes} {crc:08x}\n" for image, crc in zip(images, crcs, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()


def _difference(found: Manifest, data: Celeba, name: str) -> str | None:
    """How a packed set is not one of this source, or None. Reads every image that is not in an archive."""
    if found.name != name:
        return f"its name is {found.name!r}"
    old = {key: value for key, value in found.source.items() if key != "images"}
    if differing := {key for key, _ in old.items() ^ data.digests.items()}:
        return f"it was packed with another {min(differing)}"
    crcs = [
        image.member.CRC if image.member else zlib.crc32(next(celeba.read_images(data.path, [image])))
        for image in data.images
    ]
    return None if found.source["images"] == _digest(data.images, crcs) else "it was packed from other images"


def _shard_bytes(shard_mb: float) -> int:
    if not 0 < shard_mb < math.inf:
        raise ShardError(f"a shard of {shard_mb} MB is impossible; --shard-mb must be positive")
    return max(1, round(shard_mb * MEGABYTE))


def _summarise(result: Manifest, seconds: float) -> None:
    shards = [shard for split in result.splits.values() for shard in split.shards]
    images, megabytes = sum(shard.count for shard in shards), sum(shard.bytes for shard in shards) / MEGABYTE
    counts = ", ".join(f"{name} {split.count:,}" for name, split in result.splits.items())
    speed = f"{images / seconds:,.0f} images/s, {megabytes / seconds:,.1f} MB/s"
    size = f"{megabytes:,.1f} MB in {len(shards)} shards"
    print(f"packed {images:,} images ({counts}), {size}: {speed}; manifest {result.digest}")
