"""Reading any tree of images: splits from its folders, a table or a hash; labels from a table or the folders' names.

Images are numbered from 1 in the order of their paths; the json of a sample also holds `file`, its path.
"""

import hashlib
import os
import re
import stat
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shards import image
from shards.manifest import ShardError
from shards.sources import Files, Source, Table
from shards.sources.annotations import present
from shards.sources.labels import SPLIT_NAMES, Labels, read_labels

CLASSES = 256  # more folders than this are no classes: each would be an entry in the json of every sample
VALID = 10.0  # percent of the images, where nothing else says which are for validation
UNTELLABLE = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8
Stamp = tuple[int, int]  # size in bytes, time of the last change in ns


def read(
    root: Path,
    *,
    labels: Path | None = None,
    classes: bool = True,
    valid: float | None = None,
    allow_missing: bool = False,
) -> Source:
    """The images below `root`; files and folders with a dot before their name do not count. ShardError on any fault.

    labels: a table, see `labels.py`; without one the folders' names are attributes, if `classes`.
    valid: percent of the training images that are for validation; None: VALID, but 0 where the splits are named.
    allow_missing: leave out what the table names and the tree does not hold.
    """
    stamps = dict(_scan(root))
    if not stamps:
        raise ShardError(f"{root}: no image ({', '.join(image.SUFFIXES)}) in it or below it")
    names = sorted(stamps)
    if labels is None:
        tables = {"attributes": _classes(names, root)} if classes else {}
        split, digests = _splits(names, root, None, valid), {"labels": "folders" if classes else "none"}
    else:
        table = read_labels(labels)
        row_of = _match(names, table, root, allow_missing)
        names = sorted(row_of)
        rows = np.array([row_of[name] for name in names])
        tables, digests = {"attributes": table.attributes.rows(rows)}, {"labels": table.sha256}
        split = _splits(names, root, None if table.split is None else table.split[rows], valid)
    tables["file"] = Table(columns=(), values=np.array(names, object))
    return Source(
        place=str(root.absolute()),
        images=Files(folder=root, names=names, stamps=[stamps[name] for name in names]),
        numbers=np.arange(1, len(names) + 1),
        bytes=np.array([stamps[name][0] for name in names], np.int64),
        split=split,
        tables={entry: table for entry, table in tables.items() if table.columns or entry == "file"},
        digests=digests,
    )


def _scan(folder: Path, prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[tuple[str, Stamp]]:
    """(path below the first folder, stamp) of every image; above: device and inode of the folders on the way here."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        raise ShardError(f"{folder}: a link to a folder in which it lies; remove the link")
    for name in sorted(os.listdir(folder)):  # noqa: PTH208
        path = folder / name
        wanted = path.suffix.lower() in image.SUFFIXES
        if name.startswith("."):
            continue
        if UNTELLABLE.search(name):
            raise ShardError(f"{folder}: the name {name!a} is not plain UTF-8; rename it")
        try:
            status = path.stat()
        except FileNotFoundError:
            if wanted:
                raise ShardError(f"{path}: a link to nothing; remove it") from None
            continue
        if stat.S_ISDIR(status.st_mode):
            yield from _scan(path, f"{prefix}{name}/", (*above, here))
        elif wanted and not stat.S_ISREG(status.st_mode):
            raise ShardError(f"{path}: named as an image, but not a file; remove it")
        elif wanted:
            yield prefix + name, (status.st_size, status.st_mtime_ns)


def _match(names: list[str], table: Labels, root: Path, allow_missing: bool) -> dict[str, int]:
    """The row of the table for every image, which may name it by its path or by a file name that is the only such."""
    known, by_name = set(names), defaultdict(list)
    for name in names:
        by_name[name.rpartition("/")[2]].append(name)
    row_of: dict[str, int] = {}
    told_of: dict[str, str] = {}
    for row, told in enumerate(table.names):
        candidates = [told] if told in known else by_name.get(told, [])
        if len(candidates) > 1:
            several = f"{len(candidates)} files, {candidates[0]} and {candidates[1]} among them"
            raise ShardError(f"{table.path}: {told} is the name of {several}; give paths as from {root}")
        for name in candidates:
            if name in row_of:
                raise ShardError(f"{table.path}: {told} and {told_of[name]} are the same file; one row must go")
            row_of[name], told_of[name] = row, told
    present(root, table.names, set(told_of.values()), allow_missing)
    if unnamed := [name for name in names if name not in row_of]:
        which = f"{len(unnamed):,} of the {len(names):,} images in {root}, the first is {unnamed[0]}"
        raise ShardError(f"{table.path}: has no row for {which}")
    return row_of


def _splits(names: list[str], root: Path, told: np.ndarray | None, valid: float | None) -> np.ndarray:
    """int8 [n]: the split of each image, by the folders at the top or what a table has told, and by hashes."""
    if valid is not None and not 0 <= valid < 100:
        raise ShardError(f"--valid {valid:g} is impossible; it is a percentage below 100")
    if folders := _has_splits(names):
        tops = [name.partition("/")[0] for name in names]
        if stray := next((name for name, top in zip(names, tops, strict=True) if top not in SPLIT_NAMES), None):
            raise ShardError(f"{root}: {stray} lies in none of the folders train, valid (or val) and test; move it")
        if told is not None:
            raise ShardError(f"{root}: its folders name splits, and so does the table; the table must do without")
        split = np.array([SPLIT_NAMES[top] for top in tops], np.int8)
    else:
        split = np.zeros(len(names), np.int8) if told is None else told.copy()
    percent = valid if valid is not None else 0 if folders or told is not None else VALID
    if percent > 0:
        digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
        hashes = np.frombuffer(digests, ">u8") / 2**64
        train = split == 0
        # an image stays where it is however many are added; of a few, one at least
        split[train & (hashes <= max(percent / 100, hashes[train].min(initial=1)))] = 1
    return split


def _has_splits(names: list[str]) -> bool:
    return any(name.startswith("train/") for name in names)


def _classes(names: list[str], root: Path) -> Table:
    """Attributes uint8 [n, classes]: in which of the uppermost folders that differ, below the splits, an image lies."""
    paths = [tuple(name.split("/")[_has_splits(names) : -1]) for name in names]
    while len({path[:1] for path in paths}) == 1 and paths[0]:
        paths = [path[1:] for path in paths]
    columns = sorted({path[0] for path in paths if path})
    if len(columns) > CLASSES:
        cure = "name attributes with --labels FILE.csv, or have none with --labels none"
        raise ShardError(f"{root}: {len(columns):,} folders are too many for classes (at most {CLASSES}); {cure}")
    index = {column: i for i, column in enumerate(columns)}
    one_hot = np.vstack([np.eye(len(columns), dtype=np.uint8), np.zeros((1, len(columns)), np.uint8)])
    return Table(columns=tuple(columns), values=one_hot[[index[path[0]] if path else -1 for path in paths]])
