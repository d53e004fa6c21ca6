"""The directory a set is packed into: new, left unfinished by an interrupted pack, or complete already."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from shards import manifest
from shards.files import replacing
from shards.manifest import SPLITS, Manifest, ShardError
from shards.packing.plan import Plan, tar_name
from shards.packing.writer import record_path
from shards.sources import Source

UNFINISHED = ".unfinished"  # marks a directory in which a pack is under way, and says which
DRAFT = re.compile(r"\..+\.part")
LEFT = re.compile(rf"{DRAFT.pattern}|({'|'.join(SPLITS)})\.\w+\.npy|\.?({'|'.join(SPLITS)})-\d+\.tar(\.record)?")


@contextmanager
def unfinished(dst: Path, planned: Plan) -> Iterator[None]:
    """Makes `dst` a directory that is marked as unfinished until the block has ended well.

    What an interrupted pack with the same options left stays, see `write_shard`; ShardError if it was packed
    otherwise, or by something else.
    """
    mark, told = dst / UNFINISHED, _describe(planned)
    if dst.is_dir() and not mark.exists() and not all(DRAFT.fullmatch(path.name) for path in dst.iterdir()):
        raise ShardError(f"{dst}: not empty, and not a packed data set; choose another directory")
    dst.mkdir(parents=True, exist_ok=True)
    if mark.exists():
        _require_same(mark, told)
    else:
        with replacing(mark) as stream:
            stream.write(json.dumps(told).encode())
    tars = {tar_name(split, number) for split, number, _ in planned.shards}
    wanted = tars | {record_path(dst / tar).name for tar in tars}
    for path in dst.iterdir():
        if path.name not in wanted and LEFT.fullmatch(path.name):
            path.unlink(missing_ok=True)
    yield
    _finish(dst, tars)


def keep(found: Manifest, planned: Plan, quiet: bool) -> Manifest:
    """The complete set that is already there, if it is the one planned; ShardError if not."""
    if (difference := _difference(found, planned)) is not None:
        cure = "remove it or choose another directory"
        raise ShardError(f"{found.directory}: holds another data set ({difference}); {cure}")
    shards = [shard for split in found.splits.values() for shard in split.shards]
    for file in (*shards, *(array for split in found.splits.values() for array in split.arrays.values())):
        manifest.check_size(found.directory / file.name, file.bytes)
    _finish(found.directory, (shard.name for shard in shards))  # where a pack was killed just after the manifest
    if not quiet:
        print(f"{found.directory}: already packed from this source, manifest {found.digest}")
    return found


def images_digest(names: Iterable[str], sizes: Iterable[int], crcs: Iterable[int]) -> str:
    """One name for the contents of images in the order of the source, the same for a folder and for its archive."""
    digest = hashlib.sha256()
    for name, size, crc in zip(names, sizes, crcs, strict=True):
        digest.update(f"{name} {size} {crc:08x}\n".encode())
    return digest.hexdigest()


def _finish(dst: Path, tars: Iterable[str]) -> None:
    for name in tars:
        record_path(dst / name).unlink(missing_ok=True)
    (dst / UNFINISHED).unlink(missing_ok=True)


def _describe(planned: Plan) -> dict[str, str]:
    """What must be the same for an interrupted pack to go on. Images that change meanwhile only have their shards
    written again, so that a damaged one can be mended."""
    options, source = planned.options, planned.source
    told = {"--shard-mb": options.shard_mb, "--shuffle": options.shuffle, "--size": options.npy, "--crop": options.crop}
    return {
        "the set's name": planned.name,
        **{option: "not given" if value is None else str(value) for option, value in told.items()},
        "the source": source.place,
        **(source.digests if source.determined else {}),
    }


def _require_same(mark: Path, told: dict[str, str]) -> None:
    """ShardError if an unfinished pack is not the one that is `told`."""
    cure = "repeat its command, or remove the directory"
    try:
        before: dict[str, str] = json.loads(mark.read_bytes())
        differing = next((key for key in told if before.get(key) != told[key]), None)
    except (ValueError, AttributeError):
        raise ShardError(f"{mark.parent}: another version of this program began a pack here; {cure}") from None
    if differing is not None:
        change = f"{differing} was {before.get(differing)}, now it is {told[differing]}"
        raise ShardError(f"{mark.parent}: another pack was begun here ({change}); {cure}")


def _difference(found: Manifest, planned: Plan) -> str | None:
    """How a packed set is not the planned one, or None. Reads the images, unless digests or an archive tell of them."""
    source, options = planned.source, planned.options
    if found.name != planned.name:
        return f"its name is {found.name!r}"
    old = {key: value for key, value in found.source.items() if key != "images"}
    if differing := {key for key, _ in old.items() ^ source.digests.items()}:
        return f"it was packed with another {min(differing)}"
    scaled = (found.height, found.crop) if found.scaled else (None, None)
    if scaled != (options.npy, options.crop):
        return f"its images are {found.encoding}, {found.size_text}" + (f", crop {found.crop}" if found.crop else "")
    if not source.determined and found.source["images"] != _read_digest(source):
        return "it was packed from other images"
    if found.splits.keys() != planned.rows.keys():
        return f"its splits are {', '.join(found.splits)}"
    for split, rows in planned.rows.items():
        if not np.array_equal(found.array(split, "index")["image"], source.numbers[rows]):
            return "its images are in another order"
        if [shard.count for shard in found.splits[split].shards] != planned.counts(split):
            return "it has shards of another size"
    return None


def _read_digest(source: Source) -> str:
    return images_digest(source.images.names, source.bytes.tolist(), source.images.crc32s())
