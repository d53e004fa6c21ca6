"""Which image stands at which position of the endless stream: a pure function of (count, seed, position)."""

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
    return np.argsort(splitmix64(ids ^ np.uint64(fork(seed, "epoch", epoch))), kind="stable").astype(np.int64)


class Order:
    """Every id once in each run of `count` positions, freshly permuted each time."""

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError(f"an order needs at least one image, not {count}")
        self.count, self.seed = count, seed
        self._recent: dict[int, Ids] = {}

    def take(self, positions: Ids) -> Ids:
        """The ids at `positions` (int64, any shape, all >= 0), in the same shape; batches may straddle epochs."""
        epochs, offsets = np.divmod(positions, self.count)
        if positions.size and epochs.min() < 0:
            raise ValueError(f"positions start at 0, not {positions.min()}")
        ids = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._epoch(int(epoch))[offsets[here]]
        return ids

    def _epoch(self, epoch: int) -> Ids:
        if epoch not in self._recent:
            if len(self._recent) == 2:  # the two that a batch straddling an epoch's end needs
                del self._recent[next(iter(self._recent))]
            self._recent[epoch] = permutation(self.count, self.seed, epoch)
        return self._recent[epoch]
