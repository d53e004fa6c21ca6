"""The directory a set is packed into: new, left unfinished by an interrupted pack, or complete already."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from shards import manifest
from shards.files import replacing
from shards.manifest import SPLITS, Manifest, ShardError
from shards.packing.plan import Plan
from shards.packing.writer import Job, read_record, record_path
from shards.sources import Source

UNFINISHED = ".unfinished"  # marks a directory in which a pack is under way, and says which
DRAFT = re.compile(r"\.(.+)\.\w+\.part")  # see files.replacing
LEFT = re.compile(rf"{DRAFT.pattern}|({'|'.join(SPLITS)})\.\w+\.npy|\.?({'|'.join(SPLITS)})-\d+\.tar(\.record)?")


def begin(dst: Path, planned: Plan, own: list[Job]) -> None:
    """Makes `dst` a directory that is marked as unfinished, for packing these shards of a set.

    What an interrupted pack with the same options left stays, see `write_shard`, and so does what other parts are
    writing; ShardError if it was packed otherwise, or by something else.
    """
    mark = dst / UNFINISHED
    strange = dst.is_dir() and not all(DRAFT.fullmatch(path.name) for path in dst.iterdir())
    if strange and not mark.exists():  # in this order: another part may be making it
        raise ShardError(f"{dst}: not empty, and not a packed data set; choose another directory")
    dst.mkdir(parents=True, exist_ok=True)
    if not mark.exists():
        with replacing(mark) as stream:
            stream.write(json.dumps(_describe(planned)).encode())
    require_same(dst, planned)
    mine = {path.name for job in own for path in (job.path, record_path(job.path))}
    for path in dst.iterdir():
        if (draft := DRAFT.fullmatch(path.name)) and draft[1] in mine:
            path.unlink(missing_ok=True)
    for job in own:
        if read_record(job, deep=False) is None:  # another part must not take it for what will be written
            record_path(job.path).unlink(missing_ok=True)


def explain(error: FileNotFoundError, dst: Path) -> None:
    """Why a file of an unfinished set went away: one who packed the same has written the manifest, which is well, or
    has taken over; raises anything else."""
    if (dst / manifest.NAME).exists():
        return
    if DRAFT.fullmatch(Path(error.filename or "").name):
        raise ShardError(f"{dst}: the same was begun once more, and goes on there; this one ends") from None
    raise error


def finish(found: Manifest) -> None:
    """Removes what an unfinished set has beside the files of its manifest; its mark last."""
    shards = [shard for split in found.splits.values() for shard in split.shards]
    arrays = [array for split in found.splits.values() for array in split.arrays.values()]
    listed = {file.name for file in (*shards, *arrays)}
    for path in found.directory.iterdir():
        if path.name not in listed and LEFT.fullmatch(path.name):
            path.unlink(missing_ok=True)
    (found.directory / UNFINISHED).unlink(missing_ok=True)


def keep(found: Manifest, planned: Plan, quiet: bool, *, deep: bool = True) -> Manifest:
    """The complete set that is already there, if it is the one planned; ShardError if not. deep: reads the images."""
    if (difference := _difference(found, planned, deep)) is not None:
        cure = "remove it or choose another directory"
        raise ShardError(f"{found.directory}: holds another data set ({difference}); {cure}")
    shards = [shard for split in found.splits.values() for shard in split.shards]
    for file in (*shards, *(array for split in found.splits.values() for array in split.arrays.values())):
        manifest.check_size(found.directory / file.name, file.bytes)
    if (found.directory / UNFINISHED).exists():  # where a pack was killed just after the manifest
        finish(found)
    if not quiet:
        print(f"{found.directory}: already packed from this source, manifest {found.digest}")
    return found


def images_digest(names: Iterable[str], sizes: Iterable[int], crcs: Iterable[int]) -> str:
    """One name for the contents of images in the order of the source, the same for a folder and for its archive."""
    digest = hashlib.sha256()
    for name, size, crc in zip(names, sizes, crcs, strict=True):
        digest.update(f"{name} {size} {crc:08x}\n".encode())
    return digest.hexdigest()


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


def require_same(dst: Path, planned: Plan) -> None:
    """ShardError if the unfinished pack is not the one planned."""
    told, cure = _describe(planned), "repeat its command, or remove the directory"
    try:
        before: dict[str, str] = json.loads((dst / UNFINISHED).read_bytes())
        differing = next((key for key in told if before.get(key) != told[key]), None)
    except (ValueError, AttributeError):
        raise ShardError(f"{dst}: another version of this program began a pack here; {cure}") from None
    if differing is not None:
        change = f"{differing} was {before.get(differing)}, now it is {told[differing]}"
        raise ShardError(f"{dst}: another pack was begun here ({change}); {cure}")


def _difference(found: Manifest, planned: Plan, deep: bool) -> str | None:
    """How a packed set is not the planned one, or None. deep: reads the images, unless digests or an archive tell."""
    source, options = planned.source, planned.options
    if found.name != planned.name:
        return f"its name is {found.name!r}"
    old = {key: value for key, value in found.source.items() if key != "images"}
    if differing := {key for key, _ in old.items() ^ source.digests.items()}:
        return f"it was packed with another {min(differing)}"
    scaled = (found.height, found.crop) if found.scaled else (None, None)
    if scaled != (options.npy, options.crop):
        return f"its images are {found.encoding}, {found.size_text}" + (f", crop {found.crop}" if found.crop else "")
    if deep and not source.determined and found.source["images"] != _read_digest(source):
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
