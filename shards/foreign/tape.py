"""The bytes of a tar of unknown origin, read once from front to back."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from shards.manifest import ShardError

CHUNK = 2**20  # bytes read at a time


class Tape:
    """The bytes of a file or stream in order, with the position and the sha256 of what has been read."""

    def __init__(self, name: str, chunks: Iterator[bytes], size: int | None = None) -> None:
        """size: of the whole in bytes, where it is known beforehand."""
        self.name, self.size, self.position = name, size, 0
        self._chunks, self._chunk, self._at = chunks, b"", 0
        self._digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """The next `size` bytes; fewer only at the end."""
        end = self._at + size
        if end <= len(self._chunk):
            data = self._chunk[self._at : end]
            self._at, self.position = end, self.position + size
            return data
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[bytes]:
        """The same in pieces, so that no more than a chunk is in memory."""
        while size > 0:
            if self._at == len(self._chunk):
                self._chunk, self._at = next(self._chunks, b""), 0
                self._digest.update(self._chunk)
                if not self._chunk:
                    return
            piece = self._chunk[self._at : self._at + size]
            self._at, self.position, size = self._at + len(piece), self.position + len(piece), size - len(piece)
            yield piece

    @property
    def sha256(self) -> str:
        """Of all chunks that have been begun; of the file once its end has been read."""
        return self._digest.hexdigest()

    def fail(self, at: int, why: str) -> NoReturn:
        """ShardError that names the tar and the byte."""
        raise ShardError(f"{self.name}: byte {at}: {why}")


def file_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, `CHUNK` at a time."""
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK):
            yield chunk
