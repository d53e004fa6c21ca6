"""Counter-based random numbers: the number at (seed, purpose, position, column) is a hash of exactly that.

No generator state exists, so nothing of it is saved, and a row's numbers are the same on whatever rank, device or
micro-batch that row is computed.
"""

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vaedist.trust import trusted


def fork(seed: int, *words: str | int) -> int:
    """An independent seed in [0, 2**63) for the purpose that `words` name; the same on every machine and version."""
    text = "\0".join(map(str, (seed, *words)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def signed(value: int) -> int:
    """The int64 with the bits of an unsigned value."""
    return value - (1 << 64) if value >> 63 else value


GOLDEN, MIX1, MIX2 = (signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift(bits: Tensor, by: int) -> Tensor:
    """Logical right shift: int64 is torch's only 64-bit integer with full arithmetic, and its >> drags the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def mix(bits: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014), on int64 with wrap-around."""
    bits = (bits ^ _shift(bits, 30)) * MIX1
    bits = (bits ^ _shift(bits, 27)) * MIX2
    return bits ^ _shift(bits, 31)


def hashed(positions: Tensor, key: int | Tensor, columns: int) -> Tensor:
    """64 bits for every position and column under a key: int64 [...] -> [..., columns]."""
    rows = mix(positions * GOLDEN + key)
    column = torch.arange(1, columns + 1, device=rows.device)
    return mix(rows[..., None] + column * GOLDEN)


# One operation for torch.compile, which must not compute the hash itself: its C++ code takes column * GOLDEN for an
# index, whose overflow is undefined, and then some columns have other bits. Not by torch.library.custom_op, which
# imports the compiler when the operation is first called: seconds of every evaluation. (A training waits for it in any
# case: torch's optimisers import it.)
torch.library.define("vaedist::bits", "(Tensor positions, int seed, str purpose, int columns) -> Tensor")


def _bits(positions: Tensor, seed: int, purpose: str, columns: int) -> Tensor:
    return hashed(positions, signed(fork(seed, purpose)), columns)


def _bits_on_gpu(positions: Tensor, seed: int, purpose: str, columns: int) -> Tensor:
    if trusted(("hash", positions.device), lambda: _trial(positions.device)):
        return _at_once(positions, signed(fork(seed, purpose)), columns)
    return _bits(positions, seed, purpose, columns)


def _at_once(positions: Tensor, key: int, columns: int) -> Tensor:
    """`hashed` by one kernel in the place of 17."""
    from vaedist import kernels

    return kernels.hashed(positions, key, columns, GOLDEN, MIX1, MIX2)


def _trial(device: torch.device) -> str:
    """What is wrong with that kernel."""
    positions, key = torch.arange(0, 2**62, 2**57, device=device), signed(fork(0, "trial"))
    right = torch.equal(_at_once(positions, key, 16), hashed(positions, key, 16))
    return "" if right else "the hash has other bits"


def _fake_bits(positions: Tensor, seed: int, purpose: str, columns: int) -> Tensor:
    return positions.new_empty(*positions.shape, columns)


torch.library.impl("vaedist::bits", "CompositeExplicitAutograd", _bits)
torch.library.impl("vaedist::bits", "CUDA", _bits_on_gpu)
torch.library.register_fake("vaedist::bits", _fake_bits)


@dataclass(frozen=True)
class Noise:
    """The random numbers of some rows; `positions` int64 [...] says how many images came before each row."""

    seed: int
    positions: Tensor

    def fork(self, name: str) -> "Noise":
        """Independent numbers for the same rows."""
        return replace(self, seed=fork(self.seed, name))

    def at(self, positions: Tensor) -> "Noise":
        """The numbers of other rows for the same purposes."""
        return replace(self, positions=positions)

    def bits(self, purpose: str, columns: int) -> Tensor:
        """64 random bits each, int64 [..., columns]."""
        bits: Tensor = torch.ops.vaedist.bits(self.positions, self.seed, purpose, columns)
        return bits

    def normal(self, purpose: str, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal deviates [..., columns], by the inverse distribution function.

        Computed in float64 and rounded once, so that vector and scalar code paths of a device give the same number.
        """
        uniform = (_shift(self.bits(purpose, columns), 11).double() + 0.5) * 2.0**-53
        return torch.special.ndtri(uniform).to(dtype)

    def chance(self, purpose: str, columns: int, probability: float) -> Tensor:
        """True with `probability` (rounded to 2^-24), bool [..., columns]."""
        return _shift(self.bits(purpose, columns), 40) < round(probability * 2**24)
