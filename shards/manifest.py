"""manifest.json: what a packed data set holds. It is published last, so its presence means the set is complete."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shards.files import replacing

NAME = "manifest.json"
FORMAT = "vaedist-shards-2"
REMEDY = "mend it with `python -m shards verify DST --repair`"
SPLITS = ("train", "valid", "test")  # the values 0, 1, 2 of list_eval_partition
ARRAYS = {  # entry of a sample's json -> name of the array that holds the same for the whole split
    "attributes": "labels",
    "identity": "identity",
    "landmarks": "landmarks",
    "bbox": "bbox",  # in the coordinates of the in-the-wild photograph, not of the aligned image
    "factors": "factors",
}
INDEX = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("length", "<u4"), ("crc32", "<u4"), ("image", "<u4")])


class ShardError(Exception):
    """Something about a data set that its user can mend; the message is one line saying what, where and how."""


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of the set: its name inside the directory, its size in bytes and the sha256 of its bytes in hex."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Shard(File):
    """A tar of the set and the number of samples in it.

    url: where it does not lie beside the manifest, its URL, or its absolute path on this machine. A tar that serves
    several splits is listed in each, with the number of samples in that one.
    """

    count: int
    url: str | None = None


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A factor of variation that made the images, a column of the array `factors`, and its values if they are few."""

    name: str
    values: tuple[float, ...] = ()  # float32, ascending; empty: it varies continuously


@dataclass(frozen=True, kw_only=True)
class Split:
    """`count` samples in `shards`, in order; row i of every array belongs to sample i.

    arrays: index (dtype `INDEX`), labels uint8 [count, attributes], and where the source has them factors float32
    [count, factors], identity int32 [count], landmarks int16 [count, 10], bbox int32 [count, 4]; in indexed sets also
    keys S [count], where the others have the number of the image as the key.
    """

    count: int
    shards: tuple[Shard, ...]
    arrays: dict[str, File]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A complete set; labels are columns of `attributes`, 0 or 1."""

    directory: Path
    digest: str  # sha256 of manifest.json, hex: the identity of the whole set
    name: str
    encoding: str  # of the images: jpg, png, webp, npy, or several of them
    height: int | None  # of every image; None: they differ
    width: int | None
    smallest: int  # the least height or width of any image
    channels: int  # 1 grey, 3 colour
    scaled: bool  # decoded, to height x width pixels, when they were packed
    crop: int | None  # the centre square, in pixels of the source, that they were scaled from; None: the largest
    attributes: tuple[str, ...]
    factors: tuple[Factor, ...]
    splits: dict[str, Split]
    source: dict[str, str]  # what the set was made from: file or listing -> sha256, or a generator's arguments
    _checked: set[Path] = field(default_factory=set, init=False, repr=False, compare=False)  # arrays found right

    @property
    def size_text(self) -> str:
        """How large the images are, for people."""
        if self.height is None or self.width is None:
            return f"of different sizes, the least side {self.smallest}"
        return f"{self.width} x {self.height}"

    def split(self, name: str) -> Split:
        """The split of that name; ShardError lists those there are."""
        if name not in self.splits:
            raise ShardError(f"{self.directory}: no split {name!r}; this set has {', '.join(self.splits)}")
        return self.splits[name]

    def shard_path(self, split: str, number: int) -> Path:
        """Where shard `number` (the index's column `shard`) of a split lies; of one with a URL, a copy of it would."""
        shard = self.split(split).shards[number]
        elsewhere = shard.url is not None and shard.url.startswith("/")
        return Path(shard.url) if shard.url is not None and elsewhere else self.directory / shard.name

    def key(self, split: str, row: int) -> str:
        """What the tar calls sample `row` of a split."""
        if "keys" in self.split(split).arrays:
            return bytes(self.array(split, "keys")[row]).decode("utf-8", "backslashreplace")
        return f"{self.array(split, 'index')['image'][row]:06d}"

    def array(self, split: str, name: str) -> np.ndarray:
        """A split's array as a read-only memory map, one row a sample; see `Split.arrays` for the names.

        ShardError if the set has no such array or the file on disk is not the one the manifest describes: its sha256
        is checked when this manifest opens it first.
        """
        arrays = self.split(split).arrays
        if name not in arrays:
            raise ShardError(f"{self.directory}: split {split!r} has no array {name!r}; it has {', '.join(arrays)}")
        path = self.directory / arrays[name].name
        check_size(path, arrays[name].bytes)
        if path not in self._checked:
            if describe(path).sha256 != arrays[name].sha256:
                raise ShardError(f"{path}: its sha256 is not the one in the manifest; {REMEDY}")
            self._checked.add(path)
        try:
            array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise ShardError(f"{path}: not a numpy array file ({error}); {REMEDY}") from None
        if array.shape[:1] != (self.splits[split].count,):
            raise ShardError(f"{path}: shape {list(array.shape)} for {self.splits[split].count} samples; {REMEDY}")
        return array


def read(directory: Path | str) -> Manifest:
    """The manifest of a packed set. ShardError if there is none, or it cannot be read."""
    directory = Path(directory)
    path = directory / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        what = "incomplete (no manifest.json)" if directory.is_dir() else "there is no such data set"
        raise ShardError(f"{directory}: {what}; make it with `python -m shards pack celeba SRC {directory}`") from None
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return _parse(directory, data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ShardError(f"{path}: damaged or of another version ({reason}); pack it again") from None


def write(manifest: Manifest) -> Manifest:
    """Publish manifest.json atomically in `manifest.directory`; returns the manifest as read back, with its digest."""
    fields = asdict(manifest)
    del fields["directory"], fields["digest"], fields["_checked"]
    with replacing(manifest.directory / NAME) as stream:
        stream.write(_encode({"format": FORMAT, **fields}))
    return read(manifest.directory)


def describe(path: Path) -> File:
    """Size and sha256 of a file as it lies on the disk."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return File(name=path.name, bytes=stream.tell(), sha256=digest)


def check_size(path: Path, size: int) -> None:
    """ShardError unless `path` is a file of exactly `size` bytes."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise ShardError(f"{path}: missing; {REMEDY}") from None
    if found != size:
        raise ShardError(f"{path}: {found} bytes where the manifest says {size}; {REMEDY}")


def _encode(fields: dict[str, Any]) -> bytes:
    """The bytes of manifest.json; they contain a checksum of the rest, so that not one of them can change unseen."""
    checksum = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
    return (json.dumps({**fields, "checksum": checksum}, indent=1) + "\n").encode()


def _parse(directory: Path, data: bytes) -> Manifest:
    fields: dict[str, Any] = json.loads(data)
    if fields["format"] != FORMAT:
        raise ValueError(f"format {fields['format']!r}, this program reads {FORMAT!r}")
    del fields["checksum"]
    if _encode(fields) != data:
        raise ValueError("its checksum does not match")
    del fields["format"]
    splits = {
        name: Split(
            count=split["count"],
            shards=tuple(Shard(**shard) for shard in split["shards"]),
            arrays={key: File(**array) for key, array in split["arrays"].items()},
        )
        for name, split in fields.pop("splits").items()
    }
    for file in (file for split in splits.values() for file in (*split.shards, *split.arrays.values())):
        if file.name in ("", ".", "..") or Path(file.name).name != file.name:
            raise ValueError(f"{file.name!r} is no name of a file in this directory")
    attributes = tuple(fields.pop("attributes"))
    factors = tuple(Factor(name=factor["name"], values=tuple(factor["values"])) for factor in fields.pop("factors"))
    digest = hashlib.sha256(data).hexdigest()
    return Manifest(directory=directory, digest=digest, splits=splits, attributes=attributes, factors=factors, **fields)
