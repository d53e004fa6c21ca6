"""Tar files as webdataset's TarWriter(mtime=0) makes them, byte for byte, but at several times its speed.

Importing that one would also import torch, which takes every worker longer than writing a shard does.
"""

import hashlib
import tarfile
from pathlib import Path
from typing import IO

from shards.manifest import File

BLOCK = 512  # bytes: a header, and the unit of what follows it
RECORD = 20 * BLOCK  # a tar has whole ones
OWNER = "vaedist"  # user and group of every member, so that those of whoever packs do not show


def _header() -> bytes:
    """Of a member without name and size, its checksum left blank."""
    member = tarfile.TarInfo("")
    member.mode, member.uname, member.gname = 0o444, OWNER, OWNER
    return member.tobuf(tarfile.USTAR_FORMAT)


HEADER = _header()
REST = sum(HEADER[100:124]) + sum(HEADER[136:148]) + 8 * ord(" ") + sum(HEADER[156:])  # what no member changes


class Writer:
    """Appends members to a stream, and knows size and sha256 of what it has written."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.offset = 0  # bytes
        self._stream = stream
        self._sha256 = hashlib.sha256()

    def add(self, name: str, data: bytes) -> None:
        """A member of at most 100 ASCII characters of name."""
        start, size = name.encode("ascii").ljust(100, b"\0"), b"%011o\0" % len(data)
        checksum = b"%06o\0 " % (REST + sum(start) + sum(size))
        header = start + HEADER[100:124] + size + HEADER[136:148] + checksum + HEADER[156:]
        self._write(header + data + bytes(-len(data) % BLOCK))

    def close(self, path: Path) -> File:
        """Ends the tar; describes it as the file `path`."""
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self.offset % RECORD))
        return File(name=path.name, bytes=self.offset, sha256=self._sha256.hexdigest())

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._sha256.update(data)
        self.offset += len(data)
