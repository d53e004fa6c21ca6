"""Which image stands at which position of the endless stream: a pure function of (count, seed, position)."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vaedist.noise import fork

Ids = npt.NDArray[np.int64]


def splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One step of SplitMix64 (Steele, Lea, Flood 2014) from each state: a bijection of the 64-bit integers."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(count: int, seed: int, epoch: int) -> Ids:
    """The ids 0..count-1 in the order of one epoch, int64 [count].

    Sorting hashes, not a library's shuffle: the order must outlive every version of every library.
    """
    ids = np.arange(count, dtype=np.uint64)
    keys = splitmix64(ids ^ np.uint64(fork(seed, "epoch", epoch)))  # all different: any sorting gives the same order
    return np.argsort(keys).astype(np.int64)


class Order(Protocol):
    """Every id once in each run of `count` positions, freshly permuted each time."""

    count: int

    def take(self, positions: Ids) -> Ids:
        """The ids at `positions` (int64, any shape, all >= 0), in the same shape; batches may straddle epochs."""
        ...

    def shards(self, positions: Ids) -> tuple[list[int], list[int]]:
        """Which shards these positions may be in, and which those after them; both empty if any may come any time."""
        ...


class FullOrder:
    """One permutation of all ids an epoch."""

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError(f"an order needs at least one image, not {count}")
        self.count = count
        self._epoch = lru_cache(maxsize=2)(partial(permutation, count, seed))  # a batch may straddle two

    def take(self, positions: Ids) -> Ids:
        epochs, offsets = _split(positions, self.count)
        if positions.size and epochs.min() == epochs.max():  # almost always
            return self._epoch(int(epochs.flat[0]))[offsets]
        ids = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            ids[here] = self._epoch(epoch)[offsets[here]]
        return ids

    def shards(self, positions: Ids) -> tuple[list[int], list[int]]:
        return [], []


class WindowOrder:
    """For sets larger than the disk: shards are permuted an epoch, and ids within each window of consecutive ones.

    An epoch has the fewest windows of at most `window` shards, as even as they can be. counts: the images in each
    shard; the ids of a shard are consecutive.
    """

    def __init__(self, counts: Sequence[int], window: int, seed: int) -> None:
        self.count, self.seed = sum(counts), seed
        if self.count < 1:
            raise ValueError("an order needs at least one image")
        self._counts = np.array(counts, np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        self._windows = -(-len(counts) // window)  # an epoch
        self._shards = lru_cache(maxsize=4)(partial(permutation, len(counts), fork(seed, "shards")))
        self._ids = lru_cache(maxsize=4)(self._permuted)

    def take(self, positions: Ids) -> Ids:
        windows, ids = self._windows_of(positions), np.empty_like(positions)
        for number in np.unique(windows).tolist():
            here = windows == number
            ids[here] = self._ids(number)[positions[here] - self._first(number)]
        return ids

    def shards(self, positions: Ids) -> tuple[list[int], list[int]]:
        windows = self._windows_of(positions)
        now = dict.fromkeys(shard for w in range(windows.min(), windows.max() + 1) for shard in self._members(w))
        return list(now), [shard for shard in self._members(int(windows.max()) + 1) if shard not in now]

    def _windows_of(self, positions: Ids) -> Ids:
        """The window of each position, counted through all epochs."""
        epochs, offsets = _split(positions, self.count)
        windows = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            windows[here] = epoch * self._windows + np.searchsorted(self._ends(epoch), offsets[here], side="right")
        return windows

    def _ends(self, epoch: int) -> Ids:
        """Where in the epoch each window ends."""
        ends = np.cumsum(self._counts[self._shards(epoch)])
        return ends[np.arange(1, self._windows + 1) * len(ends) // self._windows - 1]

    def _first(self, number: int) -> int:
        """The position at which a window begins."""
        epoch, at = divmod(number, self._windows)
        return epoch * self.count + (int(self._ends(epoch)[at - 1]) if at else 0)

    def _members(self, number: int) -> list[int]:
        """The shards of a window, in their order."""
        epoch, at = divmod(number, self._windows)
        start, stop = (edge * len(self._counts) // self._windows for edge in (at, at + 1))
        members: list[int] = self._shards(epoch)[start:stop].tolist()
        return members

    def _permuted(self, number: int) -> Ids:
        ids = np.concatenate([self._starts[s] + np.arange(self._counts[s]) for s in self._members(number)])
        return ids[permutation(len(ids), fork(self.seed, "window"), number)]


def _split(positions: Ids, count: int) -> tuple[Ids, Ids]:
    """Epoch and place in the epoch of each position."""
    if positions.size and positions.min() < 0:
        raise ValueError(f"positions start at 0, not {positions.min()}")
    epochs, offsets = np.divmod(positions, count)
    return epochs, offsets
