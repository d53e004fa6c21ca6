"""The manifest and the arrays of a set whose tars somebody else has made."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shards import image, manifest
from shards.files import replacing
from shards.foreign import told
from shards.foreign.contents import Scan
from shards.foreign.places import Place
from shards.manifest import ARRAYS, Factor, File, Manifest, Shard, ShardError, Split
from shards.packing.plan import order
from shards.sources import Table

HELD_OUT = 0.05  # of the samples, where no tars are for validation
CLASSES = 1000  # that become labels, at most
IMAGE = "image member"  # in Manifest.source: the suffix of the images where it had to be chosen


def describe(
    dst: Path, places: Sequence[Place], names: Sequence[str], scans: Sequence[Scan], wanted: str | None
) -> tuple[Manifest, str]:
    """Writes arrays and manifest into `dst`; also a line that says where labels and validation come from."""
    rows, remark = _rows(places, scans)
    _, tables, about = _tables(scans)
    content = arrays(places, scans)
    dst.mkdir(parents=True, exist_ok=True)
    splits = {
        split: Split(
            count=len(own),
            shards=_shards(places, names, scans, own),
            arrays={key: _save(dst / f"{split}.{key}.npy", array) for key, array in content[split].items()},
        )
        for split, own in rows.items()
    }
    listing = "".join(f"{name} {scan.sha256}\n" for name, scan in zip(names, scans, strict=True))
    source = {"tars": hashlib.sha256(listing.encode()).hexdigest()} | ({} if wanted is None else {IMAGE: wanted})
    return manifest.write(_manifest(dst, scans, tables, splits, source)), f"{about}; {remark}"


def arrays(places: Sequence[Place], scans: Sequence[Scan]) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of every split, see Split.arrays."""
    tar = np.repeat(np.arange(len(scans)), [len(scan.index) for scan in scans])
    numbers, tables, _ = _tables(scans)
    index, keys = (np.concatenate([getattr(scan, name) for scan in scans]) for name in ("index", "keys"))
    found = {}
    for split, own in _rows(places, scans)[0].items():
        part = index[own]
        part["shard"] = np.unique(tar[own], return_inverse=True)[1]
        part["image"] = np.arange(len(own)) if numbers is None else numbers[own]
        labels = {ARRAYS[entry]: table.values[own] for entry, table in tables.items()}
        found[split] = {"index": part, "keys": keys[own]} | labels
    return found


def _rows(places: Sequence[Place], scans: Sequence[Scan]) -> tuple[dict[str, np.ndarray], str]:
    """The samples of each split, counted over all tars."""
    split = np.repeat([place.split for place in places], [len(scan.index) for scan in scans])
    count, remark = len(split), "training and validation as given"
    if "valid" not in split:
        if count < 2:
            raise ShardError(f"{places[0].location}: one sample only, where training and validation need one each")
        held = max(1, round(count * HELD_OUT))
        split[order(np.arange(count), 0)[:held]] = "valid"  # by a hash: tars may have every class at equal distances
        remark = f"no --valid: {held:,} of {count:,} samples are for validation"
    return {name: np.flatnonzero(split == name) for name in ("train", "valid") if name in split}, remark


def _tables(scans: Sequence[Scan]) -> tuple[np.ndarray | None, dict[str, Table], str]:
    """Numbers and tables of all samples, where the texts beside the images tell any, and what they were."""
    own = told.join([scan.told for scan in scans])
    if own is not None:
        return *own, f"{', '.join(own[1])} from .json"
    classes = np.concatenate([scan.classes for scan in scans])
    if (classes < 0).all():
        return None, {}, "no labels"
    if (classes < 0).any():
        return None, {}, f"no labels: {(classes < 0).sum():,} of {len(classes):,} samples have no number as .cls"
    if classes.max() >= CLASSES:
        return None, {}, f"no labels: the greatest .cls is {classes.max():,}, and labels are 0 or 1 for each class"
    return None, {"attributes": told.one_hot(classes)}, f"labels of {classes.max() + 1:,} classes from .cls"


def _shards(
    places: Sequence[Place], names: Sequence[str], scans: Sequence[Scan], rows: np.ndarray
) -> tuple[Shard, ...]:
    """The tars that hold these samples, with how many of them."""
    tar = np.repeat(np.arange(len(scans)), [len(scan.index) for scan in scans])[rows]
    used, counts = np.unique(tar, return_counts=True)
    return tuple(
        Shard(name=names[i], bytes=scans[i].bytes, sha256=scans[i].sha256, count=count, url=places[i].url)
        for i, count in zip(used.tolist(), counts.tolist(), strict=True)
    )


def _manifest(
    dst: Path, scans: Sequence[Scan], tables: dict[str, Table], splits: dict[str, Split], source: dict[str, str]
) -> Manifest:
    sizes = {size for scan in scans for size in scan.sizes}
    height, width = ({size[axis] for size in sizes} for axis in (0, 1))
    return Manifest(
        directory=dst,
        digest="",
        name=dst.resolve().name,
        encoding=", ".join(sorted({suffix[1:] for scan in scans for suffix in scan.suffixes})),
        height=height.pop() if len(height) == 1 else None,
        width=width.pop() if len(width) == 1 else None,
        smallest=min(min(size[:2]) for size in sizes),
        channels=max(size[2] for size in sizes),
        scaled=False,
        crop=None,
        attributes=tables["attributes"].columns if "attributes" in tables else (),
        factors=tuple(Factor(name=name) for name in tables["factors"].columns) if "factors" in tables else (),
        splits=splits,
        source=source,
    )


def _save(path: Path, array: np.ndarray) -> File:
    with replacing(path) as stream:
        stream.write(image.to_npy(array))
    return manifest.describe(path)
