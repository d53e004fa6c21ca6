"""Reading CelebA as people have it on disk: the zip or a folder of images, annotations as .txt or .csv, any nesting."""

import hashlib
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from shards.manifest import ShardError

IMAGES = "img_align_celeba"
PARTITION = "list_eval_partition"
ATTRIBUTES = "list_attr_celeba"
IMAGE_NAME = re.compile(r"(\d{1,9})\.jpg")


@dataclass(frozen=True, kw_only=True)
class Format:
    """An annotation file: its base name and what its values are. Without columns, the file's own header names them."""

    base: str
    dtype: np.dtype[Any]
    columns: tuple[str, ...] = ()
    suffixes: tuple[str, ...] = (".txt", ".csv")


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
    partition = _read_table(_required(files, SPLIT_FORMAT, root), SPLIT_FORMAT)
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
        raw = _read_table(path, form)
        digests[path.name] = raw.sha256
        values = raw.values[raw.order(names, partition.path)]
        if entry == "attributes":
            raw.require(np.abs(raw.values) == 1, "an attribute must be -1 or 1")
            values = (values > 0).astype(np.uint8)
        tables[entry] = Table(columns=raw.columns, values=values)
    identity = tables.get("identity")
    if identity is not None:
        tables["identity"] = Table(columns=(), values=identity.values[:, 0])

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


@dataclass(frozen=True, kw_only=True)
class _RawTable:
    path: Path
    sha256: str
    first_line: int  # of the first row, counted from 1
    columns: tuple[str, ...]
    names: list[str]
    values: np.ndarray  # [n, columns]

    def require(self, good: np.ndarray, rule: str) -> None:
        """ShardError naming file, line, image and value of the first entry of `good` [n, columns] that is False."""
        bad = np.argwhere(~good)
        if len(bad):
            row, column = bad[0]
            value = f"{self.columns[column]} is {self.values[row, column]}"
            raise ShardError(f"{self.path}: line {self.first_line + row}: {self.names[row]}: {value}; {rule}")

    def order(self, names: list[str], other: Path) -> list[int]:
        """The row of each name; ShardError unless this file names the same images as `other`, each once."""
        row = {name: i for i, name in enumerate(self.names)}
        if len(row) < len(self.names):
            again = next(name for i, name in enumerate(self.names) if row[name] != i)
            raise ShardError(f"{self.path}: {again} is listed more than once")
        for lacking, complete, missing in (
            (self.path, other, set(names) - row.keys()),
            (other, self.path, row.keys() - set(names)),
        ):
            if missing:
                which = f"{len(missing)} images of {complete.name} are missing, the first is {min(missing)}"
                raise ShardError(f"{lacking}: {which}")
        return [row[name] for name in names]


def _read_table(path: Path, form: Format) -> _RawTable:
    """Parse one annotation file: an optional count, an optional header, then rows `name value ...`."""
    data = path.read_bytes()
    _refuse_web_page(path, data)
    try:
        lines = data.decode("utf-8-sig").rstrip().splitlines()
    except UnicodeDecodeError:
        raise ShardError(f"{path}: not a text file; download it again") from None
    separator = "," if any("," in line for line in lines[:3]) else None
    rows = [[cell.strip() for cell in line.split(separator)] or [""] for line in lines]

    start, declared, columns = 0, None, form.columns
    if rows and len(rows[0]) == 1 and rows[0][0].isdecimal():
        declared, start = int(rows[0][0]), 1
    if len(rows) > start and not IMAGE_NAME.fullmatch(rows[start][0]):
        header, start = rows[start], start + 1
        named = len(rows) > start and len(header) == len(rows[start])  # the first column has a name too: image_id
        columns = tuple(header[1:] if named else header)
    if len(rows) == start:
        raise ShardError(f"{path}: lists no images")
    if form.columns and len(columns) != len(form.columns):
        raise ShardError(f"{path}: {len(columns)} columns where {form.base} has {len(form.columns)}")
    if not columns or len(set(columns)) < len(columns):
        raise ShardError(f"{path}: line {start}: the columns must have names, each another")
    if declared is not None and declared != len(rows) - start:
        raise ShardError(f"{path}: line 1 declares {declared} images, but {len(rows) - start} follow")
    values = _numbers(path, rows, start, len(columns), form.dtype)
    return _RawTable(
        path=path,
        sha256=hashlib.sha256(data).hexdigest(),
        first_line=start + 1,
        columns=columns,
        names=[row[0] for row in rows[start:]],
        values=values,
    )


def _numbers(path: Path, rows: list[list[str]], start: int, columns: int, dtype: np.dtype[Any]) -> np.ndarray:
    """The values of rows[start:] as [n, columns] of `dtype`."""

    def fail(i: int, why: str) -> NoReturn:
        raise ShardError(f"{path}: line {i + 1}: {why}")

    number = float if dtype.kind == "f" else int
    parsed = []
    for i in range(start, len(rows)):
        row = rows[i]
        if not IMAGE_NAME.fullmatch(row[0]):
            fail(i, f"{row[0]!r} is not an image name such as 000001.jpg")
        if len(row) != columns + 1:
            fail(i, f"{row[0]}: {len(row) - 1} values where {columns} are expected")
        try:
            parsed.append(list(map(number, row[1:])))
        except ValueError as error:
            fail(i, f"{row[0]}: a value is not a number ({error})")
    wide = np.array(parsed, dtype=np.float64)  # exact for every integer an annotation can hold
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    bad = np.argwhere(~((wide >= limits.min) & (wide <= limits.max)))
    if len(bad):
        row, column = bad[0]
        fail(start + row, f"{rows[start + row][0]}: {rows[start + row][1 + column]} is out of range")
    return wide.astype(dtype)


def _list_folder(directory: Path) -> dict[str, Image]:
    with os.scandir(directory) as entries:
        return {
            entry.name: Image(entry.name, entry.stat().st_size) for entry in entries if IMAGE_NAME.fullmatch(entry.name)
        }


def _list_archive(path: Path) -> dict[str, Image]:
    with path.open("rb") as stream:
        _refuse_web_page(path, stream.read(64))
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


def _read_member(stream: Any, member: zipfile.ZipInfo) -> bytes:
    """A member's bytes. zipfile itself would read the directory of all 202,599 members again in every process."""
    stream.seek(member.header_offset)
    header = stream.read(30)
    name, extra = struct.unpack("<HH", header[26:30])
    if header[:4] != b"PK\x03\x04":
        raise ValueError("no local header")
    stream.seek(name + extra, os.SEEK_CUR)
    data: bytes = stream.read(member.compress_size)
    if member.compress_type == zipfile.ZIP_DEFLATED:
        data = zlib.decompress(data, -zlib.MAX_WBITS)
    elif member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"unknown compression {member.compress_type}")
    if len(data) != member.file_size or zlib.crc32(data) != member.CRC:
        raise ValueError("its crc32 does not match")
    return data


def _refuse_web_page(path: Path, data: bytes) -> None:
    if data.lstrip()[:1] == b"<":
        why = "Google Drive answers so when its download quota is spent"
        raise ShardError(f"{path}: a web page, not the file itself ({why}); download it again")
