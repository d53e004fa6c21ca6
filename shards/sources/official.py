"""The official files of dSprites (.npz) and 3D Shapes (.h5), read without ever holding all their pixels."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from shards.manifest import ShardError

SIDE = 64  # pixels
BLOCK = 4096  # images that are unpacked together


def npz_factors(path: Path) -> np.ndarray:
    """float64 [n, 6]. The file also holds a pickle, which is left alone. ShardError if it is damaged or another."""
    with _damage(path), path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        values: np.ndarray = arrays["latents_values"]
        return values


def npz_bits(path: Path, count: int) -> np.ndarray:
    """uint8 [n, 64, 8], a bit a pixel, of all `count` images: 377 MB, an eighth of what they are in the file."""
    with _damage(path), zipfile.ZipFile(path) as archive, archive.open("imgs.npy") as stream:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        _require(shape, dtype, (count, SIDE, SIDE))
        bits = np.empty((count, SIDE, SIDE // 8), np.uint8)
        for part in np.split(bits, range(BLOCK, count, BLOCK)):
            block = np.frombuffer(stream.read(len(part) * SIDE**2), np.uint8).reshape(-1, SIDE, SIDE)
            if block.max() > 1:
                raise ValueError("a pixel is neither 0 nor 1")
            part[:] = np.packbits(block, axis=2)
        return bits


def h5_factors(path: Path) -> np.ndarray:
    """float64 [n, 6]. ShardError if the file is damaged or another."""
    with _damage(path), _open_h5(path) as file:
        values: np.ndarray = file["labels"][:]
        _require(file["images"].shape, file["images"].dtype, (len(values), SIDE, SIDE, 3))
        return values


def h5_images(path: Path, rows: np.ndarray) -> np.ndarray:
    """uint8 [len(rows), 64, 64, 3]. An image lies in pieces among those of others, which are unpacked together."""
    images = np.empty((len(rows), SIDE, SIDE, 3), np.uint8)
    order = np.argsort(rows, kind="stable")
    with _damage(path), _open_h5(path) as file:
        stored = file["images"]
        for places in np.split(order, np.flatnonzero(np.diff(rows[order] // BLOCK)) + 1):
            wanted = rows[places]
            images[places] = stored[wanted[0] : wanted[-1] + 1][wanted - wanted[0]]
    return images


def _require(shape: tuple[int, ...], dtype: Any, right: tuple[int, ...]) -> None:
    if shape != right or dtype != np.uint8:
        raise ValueError(f"its images are {dtype} {list(shape)}, not uint8 {list(right)}")


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Whatever a library says of a file that is not what it should be, in one line."""
    if not path.is_file():
        raise ShardError(f"{path}: no such file")
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, IndexError, OSError) as error:
        why = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        raise ShardError(f"{path}: not the official file, or damaged ({why}); download it again") from None


def _open_h5(path: Path) -> Any:
    try:
        import h5py
    except ImportError:
        raise ShardError(f"{path}: h5py must be there to read it: pip install h5py") from None
    return h5py.File(path, "r")
