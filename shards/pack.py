"""Packing CelebA, or a drawn set in CelebA's layout, into WebDataset tars, arrays and a manifest.

Everything written is a function of the images, the annotations and the shard size alone: packing twice, or with another
number of workers, gives the same bytes. Shards are planned first and written in parallel, each under a temporary name
until it is whole; the manifest comes last.
"""

import hashlib
import io
import json
import math
import re
import shutil
import tarfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from shards import celeba, jpeg, manifest, parallel
from shards.celeba import Celeba, Image, Table
from shards.manifest import ARRAYS, INDEX, SPLITS, File, Manifest, Shard, ShardError, Split

MEGABYTE = 10**6
OWNER = "vaedist"  # user and group of every member, so that the packer's own do not show
UNFINISHED = ".unfinished"  # marks a directory whose other files an earlier, interrupted pack left behind
OURS = re.compile(r"(train|valid|test)-\d{5,}\.tar|(train|valid|test)\.[a-z]+\.npy|\..+\.part")


def pack_celeba(
    src: Path, dst: Path, *, name: str = "celeba", shard_mb: float = 64, workers: int | None = None, quiet: bool = False
) -> Manifest:
    """Pack CelebA found below `src` into `dst`; a `dst` that already holds exactly this is left as it is.

    shard_mb: size of a shard in 10^6 bytes, about. workers: processes, by default one a core. ShardError on any fault
    of the source, and where `dst` holds something else.
    """
    return _pack(celeba.read(Path(src)), Path(dst), name, {}, _shard_bytes(shard_mb), workers, quiet)


def pack_faces(
    dst: Path,
    *,
    count: int,
    seed: int = 0,
    workers: int | None = None,
    shard_mb: float = 64,
    quiet: bool = False,
) -> Manifest:
    """Draw `count` faces and pack them into `dst` as one packs CelebA; a `dst` that already holds them is left alone.

    The drawings lie in a hidden folder beside `dst` meanwhile. For the rest see `pack_celeba`.
    """
    from shards import faces

    dst, shard_bytes = Path(dst).resolve(), _shard_bytes(shard_mb)
    generator = {"generator": "faces", "count": str(count), "seed": str(seed)}
    if (dst / manifest.NAME).exists():
        found = manifest.read(dst)
        same = {key: found.source[key] for key in generator if key in found.source} == generator
        return _keep(found, None if same else "it was not drawn with this count and seed", shard_bytes, quiet)
    _require_free(dst)
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


def plan(sizes: np.ndarray, shard_bytes: int) -> list[slice]:
    """Cut samples with images of these sizes, in bytes, into consecutive shards of equal size, about `shard_bytes`."""
    block = 512  # of a tar; the image and the json have a header of one block each, and the json is about two blocks
    cost = (-(-sizes.astype(np.int64) // block) + 4) * block
    total, end = int(cost.sum()), np.cumsum(cost)
    shard = (end - cost) * math.ceil(total / shard_bytes) // total
    starts = [*np.flatnonzero(np.diff(shard, prepend=-1)).tolist(), len(sizes)]
    return [slice(start, stop) for start, stop in pairwise(starts)]


def describe_sample(name: str, tables: dict[str, Table], row: int) -> bytes:
    """The json of one sample: what belongs to the image, whatever the set it is in."""
    entries: dict[str, object] = {"image_id": celeba.number(name)}
    for entry, table in tables.items():
        value = table.values[row]
        # by its shortest text, so that a float32 of 0.1 reads 0.1
        plain = [float(str(v)) for v in value] if value.dtype.kind == "f" else value.tolist()
        entries[entry] = dict(zip(table.columns, plain, strict=True)) if table.columns else plain
    return json.dumps(entries, separators=(",", ":")).encode()


@dataclass(frozen=True, kw_only=True)
class _Job:
    path: Path  # of the tar
    number: int  # in its split
    source: Path
    images: list[Image]
    tables: dict[str, Table]
    height: int
    width: int


def _write_shard(job: _Job) -> tuple[Shard, np.ndarray]:
    """Write one tar; returns its description and its rows of the index."""
    index = np.zeros(len(job.images), INDEX)
    with (
        manifest.replacing(job.path) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for row, data in enumerate(celeba.read_images(job.source, job.images)):
            name = job.images[row].name
            _check_image(job, name, data)
            offset = tar.offset + 512  # behind the header
            index[row] = (job.number, offset, len(data), zlib.crc32(data), celeba.number(name))
            key = name.removesuffix(".jpg")
            _add(tar, f"{key}.jpg", data)
            _add(tar, f"{key}.json", describe_sample(name, job.tables, row))
    file = manifest.describe(job.path)
    return Shard(name=file.name, bytes=file.bytes, sha256=file.sha256, count=len(index)), index


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a member as webdataset's TarWriter(mtime=0) does, which we do without: importing it imports torch, which
    in every worker takes longer than writing a shard."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.uname, member.gname = len(data), 0o444, OWNER, OWNER
    tar.addfile(member, io.BytesIO(data))


def _check_image(job: _Job, name: str, data: bytes) -> None:
    try:
        height, width = jpeg.dimensions(data)
    except ValueError as error:
        raise ShardError(f"{job.source}: {name} is {error}; get this image again") from None
    if (height, width) != (job.height, job.width):
        here, first = f"{width} x {height}", f"{job.width} x {job.height}"
        raise ShardError(f"{job.source}: {name} is {here} where the first image is {first}; all must have one size")


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
        return _keep(found, _difference(found, data, name), shard_bytes, quiet)
    start = time.monotonic()
    first = data.images[0].name
    try:
        height, width = jpeg.dimensions(next(celeba.read_images(data.path, data.images[:1])))
    except ValueError as error:
        raise ShardError(f"{data.path}: {first} is {error}; get this image again") from None

    rows = {split: np.flatnonzero(data.split == value) for value, split in enumerate(SPLITS)}
    rows = {split: which for split, which in rows.items() if len(which)}
    sizes = np.array([image.bytes for image in data.images])
    jobs = {
        split: [
            _Job(
                path=dst / f"{split}-{number:05d}.tar",
                number=number,
                source=data.path,
                images=[data.images[i] for i in which[part]],
                tables={entry: table.rows(which[part]) for entry, table in data.tables.items()},
                height=height,
                width=width,
            )
            for number, part in enumerate(plan(sizes[which], shard_bytes))
        ]
        for split, which in rows.items()
    }
    flat = [job for group in jobs.values() for job in group]
    if not quiet:
        print(f"packing {len(data.images):,} images of {data.path} into {len(flat)} shards in {dst}", flush=True)
    # a process is worth starting for a shard's worth of bytes
    processes = min(workers or parallel.cores(), math.ceil(int(sizes.sum()) / shard_bytes))
    with _unfinished(dst):
        counts = [len(job.images) for job in flat]
        written = iter(list(parallel.shown(parallel.each(_write_shard, flat, processes), counts, "packed", quiet)))
        splits, crcs = {}, np.zeros(len(data.images), np.uint32)
        for split, which in rows.items():
            shards, parts = zip(*islice(written, len(jobs[split])), strict=True)
            index = np.concatenate(parts)
            crcs[which] = index["crc32"]
            arrays = {"index": index}
            arrays |= {ARRAYS[entry]: table.rows(which).values for entry, table in data.tables.items()}
            files = {key: _save(dst / f"{split}.{key}.npy", array) for key, array in arrays.items()}
            splits[split] = Split(count=len(which), shards=shards, arrays=files)
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
                source=generator | data.digests | {"images": _digest(data.images, crcs.tolist())},
            )
        )
    if not quiet:
        _summarise(result, time.monotonic() - start)
    return result


def _save(path: Path, array: np.ndarray) -> File:
    with manifest.replacing(path) as stream:
        np.save(stream, array, allow_pickle=False)
    return manifest.describe(path)


def _digest(images: list[Image], crcs: list[int]) -> str:
    """One name for the contents of all images, the same for a folder and for an archive of them."""
    listing = "".join(f"{image.name} {image.bytes} {crc:08x}\n" for image, crc in zip(images, crcs, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()


def _difference(found: Manifest, data: Celeba, name: str) -> str | None:
    """Why a packed set is not one of this source, or None."""
    if found.name != name:
        return f"its name is {found.name!r}"
    old = {key: value for key, value in found.source.items() if key not in ("images", "generator", "count", "seed")}
    if differing := {key for key, _ in old.items() ^ data.digests.items()}:
        return f"it was packed with another {min(differing)}"
    crcs = [
        image.member.CRC if image.member else zlib.crc32(next(celeba.read_images(data.path, [image])))
        for image in data.images
    ]
    return None if found.source.get("images") == _digest(data.images, crcs) else "it was packed from other images"


def _keep(found: Manifest, difference: str | None, shard_bytes: int, quiet: bool) -> Manifest:
    """The set that is already there, if it is the one asked for; ShardError if not."""
    if difference is None:
        for name, split in found.splits.items():
            for shard in split.shards:
                manifest.check_size(found.directory / shard.name, shard.bytes)
            parts = plan(found.array(name, "index")["length"], shard_bytes)
            if [part.stop - part.start for part in parts] != [shard.count for shard in split.shards]:
                difference = "it has shards of another size"
    if difference is not None:
        raise ShardError(
            f"{found.directory}: holds another data set ({difference}); remove it or choose another directory"
        )
    if not quiet:
        print(f"{found.directory}: already packed from this source, manifest {found.digest}")
    return found


def _require_free(dst: Path) -> None:
    """ShardError unless `dst` is new, empty, or what an interrupted pack left."""
    if dst.is_dir() and any(dst.iterdir()) and not (dst / UNFINISHED).exists():
        raise ShardError(f"{dst}: not empty, and not a packed data set; choose another directory")


@contextmanager
def _unfinished(dst: Path) -> Iterator[None]:
    """Make `dst` an empty directory that is marked as unfinished until the block has ended well."""
    _require_free(dst)
    dst.mkdir(parents=True, exist_ok=True)
    (dst / UNFINISHED).touch()
    for path in dst.iterdir():
        if OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    yield
    (dst / UNFINISHED).unlink()


def _shard_bytes(shard_mb: float) -> int:
    if not shard_mb > 0:
        raise ShardError(f"a shard of {shard_mb} MB is impossible; --shard-mb must be positive")
    return max(1, round(shard_mb * MEGABYTE))


def _summarise(result: Manifest, seconds: float) -> None:
    shards = [shard for split in result.splits.values() for shard in split.shards]
    images, megabytes = sum(shard.count for shard in shards), sum(shard.bytes for shard in shards) / MEGABYTE
    counts = ", ".join(f"{name} {split.count:,}" for name, split in result.splits.items())
    speed = f"{images / seconds:,.0f} images/s, {megabytes / seconds:,.1f} MB/s"
    print(
        f"packed {images:,} images ({counts}), {megabytes:,.1f} MB in {len(shards)} shards: "
        f"{speed}; manifest {result.digest}"
    )
