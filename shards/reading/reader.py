"""The pixels of a split, decoded from its tars at every access, on all cores."""

import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import numpy as np
from threadpoolctl import threadpool_limits

from shards import image
from shards.manifest import ShardError
from shards.reading.library import Library

TOGETHER = 16  # images that a thread decodes and scales at a time


class Reader:
    """The centre square of `crop` pixels a side (None: the largest there is), scaled to `size`; see `shards.image`.

    `threads` decode at once. ShardError where an image is not the one that was packed.
    """

    def __init__(self, library: Library, split: str, *, size: int, crop: int | None, threads: int) -> None:
        manifest = library.manifest
        if manifest.scaled and (size, crop) != (manifest.height, manifest.crop):
            cure = f"say data.size={manifest.height} data.crop={'null' if manifest.crop is None else manifest.crop}"
            raise ShardError(f"{library.location}: its images were scaled when they were packed; {cure}")
        if not manifest.scaled and crop is not None and crop > manifest.smallest:
            told = f"data.crop={crop} is larger than its images, {manifest.size_text}"
            raise ShardError(f"{library.location}: {told}; say data.crop=null for the largest square of each")
        self.library, self.split, self.size, self.crop = library, split, size, crop
        self.count, self.shape = manifest.split(split).count, (manifest.channels, size, size)
        self.shards = len(manifest.split(split).shards)
        self._cut = None if manifest.scaled else crop
        self._index = np.array(manifest.array(split, "index"))
        self._tars: dict[int, np.ndarray] = {}
        self._coming: set[int] = set()  # shards that are being fetched ahead
        self._guard = threading.Lock()
        scales = not manifest.scaled and (crop or manifest.smallest) != size
        self._pool = ThreadPoolExecutor(threads, "decode", initializer=_alone if scales else None)
        if not library.is_fetched(split):
            for number in range(self.shards):  # what is missing shows at once
                self._tar(number)

    def read(self, ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """The images `ids` (int64 [n], 0 <= id < count) as uint8 [n, *shape], in `out` if given."""
        if out is None:
            out = np.empty((len(ids), *self.shape), np.uint8)
        parts = [slice(at, at + TOGETHER) for at in range(0, len(ids), TOGETHER)]
        work = [self._pool.submit(self._decode, ids[part], out[part]) for part in parts]
        wait(work, return_when=FIRST_EXCEPTION)
        begun = [future for future in work if not future.cancel()]
        wait(begun)  # nothing reads on behind the back of whoever handles the error
        for future in begun:
            future.result()
        return out

    def shards_of(self, ids: np.ndarray) -> list[int]:
        """The shards that hold these images, ascending."""
        shards: list[int] = np.unique(self._index["shard"][ids]).tolist()
        return shards

    def in_shard(self, ids: np.ndarray, number: int) -> np.ndarray:
        """Which of these images a shard holds, bool [len(ids)]."""
        found: np.ndarray = self._index["shard"][ids] == number
        return found

    def rows(self, number: int) -> np.ndarray:
        """The ids of the images in a shard, ascending."""
        return np.flatnonzero(self._index["shard"] == number)

    def expect(self, now: Sequence[int], soon: Sequence[int]) -> None:
        """Have the shards `now` here, begin to fetch those of `soon` in their order, and let go of all others.

        Returns when those of `now` are here; nothing else may be reading meanwhile.
        """
        if not self.library.is_fetched(self.split):
            return
        for number in self._tars.keys() - {*now, *soon}:
            del self._tars[number]
            self.library.release(self.split, number)
        for number in self._coming - {*now, *soon}:
            self._coming.remove(number)
            self.library.cancel(self.split, number)
        self._prefetch(now)
        for number in now:
            self._tar(number)
            self._coming.discard(number)
        self._prefetch(soon)

    def _prefetch(self, numbers: Sequence[int]) -> None:
        new = [number for number in numbers if number not in self._tars and number not in self._coming]
        self.library.prefetch(self.split, new)
        self._coming.update(new)

    def _tar(self, number: int) -> np.ndarray:
        tar = self._tars.get(number)
        if tar is None:
            with self._guard:  # the threads that decode may need it at the same moment
                if number not in self._tars:
                    path = self.library.path(self.split, number)
                    self._tars[number] = np.asarray(np.memmap(path, np.uint8, "r"))
                tar = self._tars[number]
        return tar

    def _decode(self, ids: np.ndarray, out: np.ndarray) -> None:
        out[:] = image.scale([self._square(row) for row in ids.tolist()], self.size)

    def _square(self, row: int) -> np.ndarray:
        shard, offset, length, crc32, _ = self._index[row].item()
        payload = self._tar(shard)[offset : offset + length].tobytes()
        if zlib.crc32(payload) != crc32:
            raise self._corrupt(row, "its crc32 is not the one of the index")
        try:
            return image.centre(image.decode(payload, self.shape[0]), self._cut)
        except ValueError as error:
            raise self._corrupt(row, f"it is {error}") from None

    def _corrupt(self, row: int, reason: str) -> ShardError:
        shard, offset, _, _, _ = self._index[row].item()
        where, key = self.library.where(self.split, shard), self.library.manifest.key(self.split, row)
        cure = f"run `python -m shards verify {self.library.location}`"
        return ShardError(f"{where}: image {key} at byte {offset} is corrupt: {reason}; {cure}")


def _alone() -> None:
    """Has torch work in the calling thread only: the others of the pool are busy, and its own would wait for cores."""
    import torch  # noqa: F401  what is not loaded yet cannot be limited

    threadpool_limits(limits=1, user_api="openmp")
