"""Images in a zip, read in place."""

import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from shards.manifest import ShardError


@dataclass(frozen=True, kw_only=True)
class Archive:
    """Images that are members of a zip; `Images`, see there."""

    path: Path
    members: list[zipfile.ZipInfo]

    @property
    def names(self) -> list[str]:
        return [_base(member) for member in self.members]

    def part(self, rows: np.ndarray) -> "Archive":
        return Archive(path=self.path, members=[self.members[i] for i in rows])

    def read(self) -> Iterator[bytes]:
        with self.path.open("rb") as stream:
            for member in self.members:
                try:
                    data = _read_member(stream, member)
                except (ValueError, struct.error, zlib.error) as error:
                    where = f"{self.path}: {_base(member)}"
                    raise ShardError(f"{where} is damaged ({error}); download the archive again") from None
                yield data

    def crc32s(self) -> Iterable[int]:
        return (member.CRC for member in self.members)

    def version(self) -> object:
        return [(_base(member), member.file_size, member.CRC) for member in self.members]


def members(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive by their file name; ShardError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {_base(member): member for member in archive.infolist()}
    except zipfile.BadZipFile:
        raise ShardError(f"{path}: not a zip archive, or its end is missing; download it again") from None


def _base(member: zipfile.ZipInfo) -> str:
    return member.filename.rpartition("/")[2]


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
