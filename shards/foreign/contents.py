"""What a tar that somebody else made holds for training: in every sample an image, and what is said about it."""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from shards import image
from shards.foreign import told
from shards.foreign.members import Member, members
from shards.foreign.tape import Tape
from shards.manifest import INDEX
from shards.sources import Table

NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # key and suffix, as webdataset.tariterators.base_plus_ext
HIDDEN = re.compile(r"__[^/]*__($|/)")  # as webdataset's skip_meta
LARGEST = image.MAX_PIXELS * 3 + 4096  # bytes of an image
LARGEST_TEXT = 2**16  # bytes of a .cls or .json
TEXTS = ("cls", "json")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A member that may be the image of its sample."""

    member: Member
    crc32: int
    size: tuple[int, int, int] | None  # height, width, channels
    fault: str  # why it has no size
    suffix: str  # in the tar, without its first dot
    kind: str  # the suffix of files with such bytes


@dataclass(kw_only=True)
class Sample:
    """Consecutive members with the same key."""

    key: str
    at: int  # byte of its first header
    suffixes: list[str] = field(default_factory=list)
    pictures: dict[str, Picture] = field(default_factory=dict)  # by suffix
    texts: dict[str, bytes] = field(default_factory=dict)  # those of TEXTS


@dataclass(frozen=True, kw_only=True)
class Scan:
    """A tar that has been read; row i of everything belongs to sample i."""

    bytes: int
    sha256: str
    index: np.ndarray  # [count] of INDEX, with shard and image 0
    keys: np.ndarray  # [count] of S
    sizes: list[tuple[int, int, int]]  # the different (height, width, channels) in it
    suffixes: list[str]
    classes: np.ndarray  # int64 [count] of .cls; -1 where there is none, or it is no number
    told: tuple[np.ndarray, dict[str, Table]] | None  # of .json, see told.stack


def scan(tape: Tape, wanted: str | None) -> Scan:
    """Reads a whole tar. wanted: the suffix of the image in samples that have several.

    ShardError, naming tar, byte and key, for what `members.members` refuses and for samples without one good image.
    """
    keys, rows, sizes, suffixes, classes, rows_told = [], [], set(), set(), [], []
    for sample in samples(tape, wanted):
        picture = chosen(tape, sample, wanted)
        if picture.size is None:
            tape.fail(picture.member.at, f"{picture.member.name!r} is {picture.fault}")
        keys.append(sample.key.encode("utf-8", "surrogateescape"))
        rows.append((0, picture.member.offset, picture.member.size, picture.crc32, 0))
        sizes.add(picture.size)
        suffixes.add(picture.kind)
        text = sample.texts.get("cls", b"").strip()
        classes.append(int(text) if text.isdigit() and len(text) < 10 else -1)
        rows_told.append(told.parse(sample.texts.get("json", b"")))
    if not keys:
        tape.fail(tape.position, "the tar ends without a single sample")
    return Scan(
        bytes=tape.position,
        sha256=tape.sha256,
        index=np.array(rows, INDEX),
        keys=np.array(keys, np.bytes_),
        sizes=sorted(sizes),
        suffixes=sorted(suffixes),
        classes=np.array(classes, np.int64),
        told=told.stack(rows_told),
    )


def samples(tape: Tape, wanted: str | None) -> Iterator[Sample]:
    """The members of a tar by their key, as webdataset groups them; those without one are left out, as there."""
    seen: set[str] = set()
    sample = None
    for member in members(tape):
        match = NAME.fullmatch(member.name)
        if match is None or HIDDEN.match(member.name):
            continue
        key, suffix = match[1], match[2].lower()
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            if key in seen:
                tape.fail(member.at, f"{key!r} comes again after other samples; sort the members by name")
            seen.add(key)
            sample = Sample(key=key, at=member.at)
        if suffix in sample.suffixes:
            tape.fail(member.at, f"{member.name!r} comes twice in the sample {key!r}")
        sample.suffixes.append(suffix)
        if suffix in TEXTS and member.size <= LARGEST_TEXT:
            sample.texts[suffix] = tape.read(member.size)
        elif suffix == wanted or (wanted is None and _is_image(suffix)):
            sample.pictures[suffix] = _picture(tape, member, suffix)
    if sample is not None:
        yield sample


def _is_image(suffix: str) -> bool:
    return "." + suffix.rpartition(".")[2] in image.SUFFIXES


def _picture(tape: Tape, member: Member, suffix: str) -> Picture:
    if member.size > LARGEST:
        why = f"an image of {member.size:,} bytes; more than {LARGEST:,} are refused"
        return Picture(member=member, crc32=0, size=None, fault=why, suffix=suffix, kind="")
    data = tape.read(member.size)
    try:
        size, fault = image.dimensions(data), ""
    except ValueError as error:
        size, fault = None, str(error)
    crc32, kind = zlib.crc32(data), image.suffix(data)
    return Picture(member=member, crc32=crc32, size=size, fault=fault, suffix=suffix, kind=kind)


def chosen(tape: Tape, sample: Sample, wanted: str | None) -> Picture:
    """The image of a sample: what is `wanted`, else the only suffix that is an image's, as a whole or else at its end.

    So of `seg.png` and `jpg` it is `jpg`.
    """
    whole = [suffix for suffix in sample.pictures if "." + suffix in image.SUFFIXES]
    found = list(sample.pictures) if wanted is not None else whole or list(sample.pictures)
    if len(found) == 1:
        return sample.pictures[found[0]]
    if not found:
        has = ", ".join(sample.suffixes[:8])
        tape.fail(sample.at, f"the sample {sample.key!r} has no {wanted or 'image'}, only {has}")
    several = ", ".join(found[:8])
    tape.fail(sample.at, f"the sample {sample.key!r} has several images: {several}; choose with --image {found[0]}")
