"""Reading CelebA as people have it on disk: the zip or a folder of images, annotations as .txt or .csv, any nesting."""

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from shards.manifest import Factor, ShardError
from shards.sources import Files, Images, Source, Table
from shards.sources.annotations import IMAGE_NAME, Format, RawTable, present, read_table, refuse_web_page
from shards.sources.archive import Archive, members

IMAGES = "img_align_celeba"
PARTITION = "list_eval_partition"
ATTRIBUTES = "list_attr_celeba"

# Entry of a sample's json -> the annotation file it is read from; only the attributes are required.
FORMATS = {
    "attributes": Format(base=ATTRIBUTES, dtype=np.dtype(np.int8)),
    "identity": Format(base="identity_CelebA", dtype=np.dtype(np.int32), columns=("identity",)),
    "landmarks": Format(
        base="list_landmarks_align_celeba",
        dtype=np.dtype(np.int16),
        columns=tuple(
            f"{part}_{axis}" for part in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth") for axis in "xy"
        ),
    ),
    "bbox": Format(base="list_bbox_celeba", dtype=np.dtype(np.int32), columns=("x_1", "y_1", "width", "height")),
    "factors": Format(base="factors", dtype=np.dtype(np.float32), suffixes=(".csv",)),
}
SPLIT_FORMAT = Format(base=PARTITION, dtype=np.dtype(np.int8), columns=("partition",))


def read(root: Path, *, allow_missing: bool = False) -> Source:
    """Find and check the images and the annotations anywhere below `root`. ShardError on any fault.

    allow_missing: leave out what the annotations name and the folder or archive does not hold.
    """
    files, path = _find(root)
    partition = read_table(_required(files, SPLIT_FORMAT, root), SPLIT_FORMAT)
    partition.require((partition.values >= 0) & (partition.values < 3), "the split must be 0, 1 or 2")
    partition.require_same(partition.names, partition.path)
    listed = sorted(partition.names, key=number)
    for name, after in pairwise(listed):
        if number(name) == number(after):
            raise ShardError(f"{partition.path}: {name} and {after} have the same number; one of them must go")
    _required(files, FORMATS["attributes"], root)
    raws = {}
    for entry, form in FORMATS.items():
        if (found := _one(files, form)) is not None:
            raws[entry] = read_table(found, form)
            raws[entry].require_same(listed, partition.path)
    images, sizes = (_list_archive if path.suffix == ".zip" else _list_folder)(path, listed, allow_missing)
    tables = {entry: _table(entry, raw, images.names) for entry, raw in raws.items()}
    return Source(
        place=str(path.absolute()),
        images=images,
        numbers=np.array([number(name) for name in images.names], np.int64),
        bytes=np.array(sizes, np.int64),
        split=partition.values[partition.rows(images.names), 0],
        tables=tables,
        digests={raw.path.name: raw.sha256 for raw in (partition, *raws.values())},
        factors=tuple(Factor(name=name) for name in tables["factors"].columns) if "factors" in tables else (),
    )


def number(name: str) -> int:
    """The number of an image, from its file name."""
    return int(name.removesuffix(".jpg"))


def _table(entry: str, raw: RawTable, names: Sequence[str]) -> Table:
    values = raw.values[raw.rows(names)]
    if entry == "identity":
        return Table(columns=(), values=values[:, 0])
    if entry == "attributes":
        raw.require(np.abs(raw.values) == 1, "an attribute must be -1 or 1")
        values = (values > 0).astype(np.uint8)
    return Table(columns=raw.columns, values=values)


def _find(root: Path) -> tuple[dict[str, list[Path]], Path]:
    """Annotation files by name, and the archive or folder of the images. The archive wins: a folder may be partial."""
    if not root.is_dir():
        raise ShardError(f"{root}: no such folder; give the one that holds {IMAGES}.zip or {IMAGES}/ and the lists")
    wanted = {form.base + suffix for form in (SPLIT_FORMAT, *FORMATS.values()) for suffix in form.suffixes}
    wanted.add(f"{IMAGES}.zip")
    files: dict[str, list[Path]] = {}
    folders: list[Path] = []
    for directory, children, names in os.walk(root, followlinks=True):
        children.sort()
        here = Path(directory)
        for name in wanted.intersection(names):
            files.setdefault(name, []).append(here / name)
        if here.resolve().name == IMAGES or here.name == IMAGES:
            folders.extend([here] if any(name.endswith(".jpg") for name in names) else [])
    sources = files.get(f"{IMAGES}.zip", []) or folders
    if not sources:
        raise ShardError(f"{root}: neither {IMAGES}.zip nor a folder {IMAGES}/ with .jpg files anywhere below it")
    if len(sources) > 1:
        raise ShardError(f"{root}: images twice, in {sources[0]} and {sources[1]}; give the folder of one of them")
    return files, sources[0]


def _one(files: dict[str, list[Path]], form: Format) -> Path | None:
    """The annotation file of a format, .txt before .csv, None where there is none."""
    for suffix in form.suffixes:
        paths = files.get(form.base + suffix, [])
        if len({path.read_bytes() for path in paths}) > 1:
            raise ShardError(f"{paths[0]} and {paths[1]} differ; give the folder of one of them")
        if paths:
            return paths[0]
    return None


def _required(files: dict[str, list[Path]], form: Format, root: Path) -> Path:
    path = _one(files, form)
    if path is None:
        raise ShardError(f"{root}: no {form.base}.txt (or .csv) anywhere below it; it comes with CelebA's annotations")
    return path


Listing = tuple[Images, list[int]]  # the images, and their sizes in bytes


def _list_folder(folder: Path, names: list[str], allow_missing: bool) -> Listing:
    with os.scandir(folder) as entries:
        found = {entry.name: entry.stat() for entry in entries if IMAGE_NAME.fullmatch(entry.name)}
    names = present(folder, names, found, allow_missing)
    stamps = [(found[name].st_size, found[name].st_mtime_ns) for name in names]
    return Files(folder=folder, names=names, stamps=stamps), [size for size, _ in stamps]


def _list_archive(path: Path, names: list[str], allow_missing: bool) -> Listing:
    with path.open("rb") as stream:
        refuse_web_page(path, stream.read(64))
    found = members(path)
    chosen = [found[name] for name in present(path, names, found, allow_missing)]
    return Archive(path=path, members=chosen), [member.file_size for member in chosen]
