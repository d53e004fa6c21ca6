"""Reading CelebA as people have it on disk: the zip or a folder of images, annotations as .txt or .csv, any nesting."""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np

from shards.annotations import IMAGE_NAME, Format, read_table, refuse_web_page
from shards.manifest import ShardError

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


@dataclass(frozen=True, kw_only=True)
class Table:
    """Values of one kind for n images: [n, columns], or [n] where there are no columns to name."""

    columns: tuple[str, ...]
    values: np.ndarray

    def rows(self, which: np.ndarray) -> "Table":
        """The same for some of the images."""
        return Table(columns=self.columns, values=self.values[which])


@dataclass(frozen=True, slots=True)
class Image:
    """Where the bytes of one image are: a file of that name in the folder, or a member of the archive."""

    name: str
    bytes: int
    member: zipfile.ZipInfo | None = None


@dataclass(frozen=True, kw_only=True)
class Celeba:
    """A whole source, checked for consistency, in the order of the image numbers; no image has been opened yet."""

    path: Path  # img_align_celeba.zip, or the folder that holds the .jpg files
    images: list[Image]
    split: np.ndarray  # int8 [n]: 0 train, 1 valid, 2 test
    tables: dict[str, Table]  # keys as in FORMATS; attributes are 0 or 1
    digests: dict[str, str]  # annotation file name -> sha256


def read(root: Path) -> Celeba:
    """Find and check the images and the annotations anywhere below `root`. ShardError on any fault."""
    files, images_path = _find(root)
    partition = read_table(_required(files, SPLIT_FORMAT, root), SPLIT_FORMAT)
    partition.require((partition.values >= 0) & (partition.values <= 2), "the split must be 0, 1 or 2")
    names = sorted(partition.names, key=number)
    split = partition.values[partition.order(names, partition.path), 0]
    for name, after in pairwise(names):
        if number(name) == number(after):
            raise ShardError(f"{partition.path}: {name} and {after} have the same number; one of them must go")

    tables, digests = {}, {partition.path.name: partition.sha256}
    _required(files, FORMATS["attributes"], root)
    for entry, form in FORMATS.items():
        path = _one(files, form)
        if path is None:
            continue
        raw = read_table(path, form)
        digests[path.name] = raw.sha256
        values = raw.values[raw.order(names, partition.path)]
        if entry == "attributes":
            raw.require(np.abs(raw.values) == 1, "an attribute must be -1 or 1")
            values = (values > 0).astype(np.uint8)
        tables[entry] = Table(columns=raw.columns, values=values)
    if "identity" in tables:
        tables["identity"] = Table(columns=(), values=tables["identity"].values[:, 0])

    found = _list_archive(images_path) if images_path.suffix == ".zip" else _list_folder(images_path)
    missing = [name for name in names if name not in found]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ShardError(f"{images_path}: {len(missing)} of {len(names)} images are missing: {some}")
    images = [found[name] for name in names]
    return Celeba(path=images_path, images=images, split=split, tables=tables, digests=digests)


def number(name: str) -> int:
    """The number of an image, from its file name."""
    return int(name.removesuffix(".jpg"))


def read_images(path: Path, images: Sequence[Image]) -> Iterator[bytes]:
    """The bytes of each image of a source, from its folder or archive. Needs no state: any process may call it."""
    if path.suffix != ".zip":
        for image in images:
            yield (path / image.name).read_bytes()
        return
    with path.open("rb") as stream:
        for image in images:
            assert image.member is not None
            try:
                data = _read_member(stream, image.member)
            except (ValueError, struct.error, zlib.error) as error:
                raise ShardError(f"{path}: {image.name} is damaged ({error}); download the archive again") from None
            yield data


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


def _list_folder(directory: Path) -> dict[str, Image]:
    with os.scandir(directory) as entries:
        return {
            entry.name: Image(entry.name, entry.stat().st_size) for entry in entries if IMAGE_NAME.fullmatch(entry.name)
        }


def _list_archive(path: Path) -> dict[str, Image]:
    with path.open("rb") as stream:
        refuse_web_page(path, stream.read(64))
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile:
        raise ShardError(f"{path}: not a zip archive, or its end is missing; download it again") from None
    found = {}
    for member in members:
        name = member.filename.rpartition("/")[2]
        if IMAGE_NAME.fullmatch(name):
            found[name] = Image(name, member.file_size, member)
    return found


def _read_member(stream: IO[bytes], member: zipfile.ZipInfo) -> bytes:
    """A member's bytes. zipfile itself would read the directory of all 202,599 members again in every process."""
    stream.seek(member.header_offset)
    header = stream.read(30)
    name, extra = struct.unpack("<HH", header[26:30])
    if header[:4] != b"PK\x03\x04":
        raise ValueError("no local header")
    stream.seek(name + extra, os.SEEK_CUR)
    data = stream.read(member.compress_size)
    if member.compress_type == zipfile.ZIP_DEFLATED:
        data = zlib.decompress(data, -zlib.MAX_WBITS)
    elif member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"unknown compression {member.compress_type}")
    if len(data) != member.file_size or zlib.crc32(data) != member.CRC:
        raise ValueError("its crc32 does not match")
    return data
