"""The directory a set is packed into: new, left unfinished by an interrupted pack, or complete already."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards import manifest, writer
from shards.manifest import Manifest, ShardError

UNFINISHED = ".unfinished"  # marks a directory in which an interrupted pack may have left files
OURS = re.compile(r"(train|valid|test)-\d{5,}\.tar|(train|valid|test)\.[a-z]+\.npy|\..+\.part")


def require_free(dst: Path) -> None:
    """ShardError unless `dst` is new, empty, or what an interrupted pack left."""
    if dst.is_dir() and any(dst.iterdir()) and not (dst / UNFINISHED).exists():
        raise ShardError(f"{dst}: not empty, and not a packed data set; choose another directory")


@contextmanager
def unfinished(dst: Path) -> Iterator[None]:
    """Make `dst` an empty directory that is marked as unfinished until the block has ended well."""
    require_free(dst)
    dst.mkdir(parents=True, exist_ok=True)
    (dst / UNFINISHED).touch()
    for path in dst.iterdir():
        if OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    yield
    (dst / UNFINISHED).unlink()


def keep(found: Manifest, difference: str | None, shard_bytes: int, quiet: bool) -> Manifest:
    """The complete set that is already there, if it is the one asked for; ShardError if not.

    difference: how its source is another one, None if it is the same.
    """
    difference = difference or _other_shards(found, shard_bytes)
    if difference is not None:
        cure = "remove it or choose another directory"
        raise ShardError(f"{found.directory}: holds another data set ({difference}); {cure}")
    for split in found.splits.values():
        for file in (*split.shards, *split.arrays.values()):
            manifest.check_size(found.directory / file.name, file.bytes)
    if not quiet:
        print(f"{found.directory}: already packed from this source, manifest {found.digest}")
    return found


def _other_shards(found: Manifest, shard_bytes: int) -> str | None:
    for name, split in found.splits.items():
        parts = writer.plan(found.array(name, "index")["length"], shard_bytes)
        if [part.stop - part.start for part in parts] != [shard.count for shard in split.shards]:
            return "it has shards of another size"
    return None
