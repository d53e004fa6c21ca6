"""The tars of a set with what the arrays say about the samples in each, wherever the tars lie."""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from shards.manifest import ARRAYS, Manifest, Shard, ShardError
from shards.remote.fetch import download, is_remote, refuse_pipe


@dataclass(frozen=True, kw_only=True)
class Tar:
    """A tar and the splits that it serves, each with the tar's number in it."""

    shard: Shard  # in the first of them
    path: Path  # where it lies; where a copy would, if it lies behind a URL
    url: str | None  # the URL if it has one and no copy is here
    parts: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What the arrays of a set say about all samples of a tar, in the order of the tar."""

    manifest: Manifest  # without the splits: this goes to another process
    tar: Tar
    index: np.ndarray  # [count] of INDEX
    keys: list[str]
    arrays: dict[str, np.ndarray]  # [count, ...] by the name of the entry in a sample's json
    foreign: bool  # somebody else has made the tar

    def parts(self, most: int) -> Iterator["Samples"]:
        """The same in parts of so many samples, at most."""
        for start in range(0, len(self.keys), most):
            rows = slice(start, start + most)
            arrays = {entry: array[rows] for entry, array in self.arrays.items()}
            yield replace(self, index=self.index[rows], keys=self.keys[rows], arrays=arrays)


def tars(found: Manifest) -> list[Tar]:
    """All tars, each once."""
    parts: dict[str, list[tuple[str, int]]] = {}
    for name, split in found.splits.items():
        for number, shard in enumerate(split.shards):
            parts.setdefault(shard.name, []).append((name, number))
    return [_tar(found, where) for where in parts.values()]


def _tar(found: Manifest, parts: list[tuple[str, int]]) -> Tar:
    split, number = parts[0]
    shard, path = found.splits[split].shards[number], found.shard_path(split, number)
    url = shard.url if shard.url is not None and is_remote(shard.url) and not path.exists() else None
    return Tar(shard=shard, path=path, url=url, parts=tuple(parts))


def samples(found: Manifest, tar: Tar, damaged: Collection[str]) -> Samples:
    """The rows of a tar; the index must be sound, other arrays that are `damaged` (names of files) are left out."""
    names = [name for name, _ in tar.parts]
    rows = [np.flatnonzero(found.array(name, "index")["shard"] == number) for name, number in tar.parts]
    index = np.concatenate([found.array(name, "index")[own] for name, own in zip(names, rows, strict=True)])
    order = np.argsort(index["offset"], kind="stable")

    def gather(key: str) -> np.ndarray | None:
        files = [found.splits[name].arrays[key] for name in names if key in found.splits[name].arrays]
        if len(files) < len(names) or any(file.name in damaged for file in files):
            return None
        return np.concatenate([found.array(name, key)[own] for name, own in zip(names, rows, strict=True)])[order]

    arrays = {entry: array for entry, key in ARRAYS.items() if (array := gather(key)) is not None}
    keys, index = gather("keys"), index[order]
    texts = [f"{number:06d}" for number in index["image"]] if keys is None else [_text(key) for key in keys.tolist()]
    foreign = "keys" in found.splits[names[0]].arrays
    return Samples(manifest=replace(found, splits={}), tar=tar, index=index, keys=texts, arrays=arrays, foreign=foreign)


def _text(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


@contextmanager
def local(tar: Tar) -> Iterator[Path]:
    """The tar as a file: where it lies, or fetched from its URL for the time being; ShardError if that fails."""
    if tar.url is None:
        yield tar.path
        return
    refuse_pipe(tar.url, "manifest.json")
    with TemporaryDirectory(prefix="vaedist-") as folder:
        path = Path(folder) / tar.shard.name
        download(tar.url, path, size=tar.shard.bytes, sha256=tar.shard.sha256)
        yield path


def faults(job: Samples, find: Callable[[Samples, Path], Iterator[str]]) -> list[str]:
    """What find(job, path) says about the tar of some samples, with the name of the tar, or why the tar is not here."""
    try:
        with local(job.tar) as path:
            return [f"{job.tar.shard.name}: {fault}" for fault in find(job, path)]
    except ShardError as error:
        return [f"{job.tar.shard.name}: {error}"]
