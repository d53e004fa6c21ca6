"""A hundred single bytes changed at random: none goes unseen by verify, and none that matters by training."""

import random
import shutil
import tarfile

import numpy as np
import pytest
import torch
from tiny_set import pack_tiny

from shards import manifest
from shards.checking.verify import verify
from shards.manifest import ShardError
from shards.reading.decoded import PIXELS
from shards.reading.library import Library
from shards.reading.reader import Reader
from vaedist.data.store import TarStore, open_store

FLIPS = {  # what is hit -> how often
    "image header": 15,
    "image": 20,
    "padding": 10,
    "json header": 10,
    "json": 10,
    "end": 5,
    "index": 10,
    "manifest": 10,
    "labels": 5,
    "decoded": 5,
}
SPLITS = ("train", "valid")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return pack_tiny(tmp_path_factory.mktemp("fuzz") / "set")


def read(directory):
    """All that training reads: pixels and labels of every split."""
    found = manifest.read(directory)
    library = Library(str(found.directory), found.directory)
    stores = {split: TarStore(Reader(library, split, size=16, crop=None, threads=2)) for split in SPLITS}
    pixels = [store.gather(np.arange(store.count)).numpy() for store in stores.values()]
    return [*pixels, *(np.array(found.array(split, "labels")) for split in SPLITS)]


def place(found, kind, chance):
    """(file, byte, key of its sample if it belongs to one) of a place of some kind, by chance."""
    split = chance.choice(SPLITS)
    if kind in ("index", "labels"):
        path = found.directory / found.splits[split].arrays[kind].name
        return path, chance.randrange(path.stat().st_size), None
    if kind == "manifest":
        path = found.directory / "manifest.json"
        return path, chance.randrange(path.stat().st_size), None
    row = found.array(split, "index")[chance.randrange(found.splits[split].count)]
    path, offset, length = found.shard_path(split, row["shard"]), int(row["offset"]), int(row["length"])
    padded = offset + -(-length // 512) * 512
    data = path.read_bytes()
    json = int(tarfile.TarInfo.frombuf(data[padded : padded + 512], "utf-8", "strict").size)
    start, stop = {
        "image header": (offset - 512, offset),
        "image": (offset, offset + length),
        "padding": (offset + length, padded),
        "json header": (padded, padded + 512),
        "json": (padded + 512, padded + 512 + json),
        "end": (len(data.rstrip(b"\0")) // 512 * 512 + 512, len(data)),
    }[kind]
    if start == stop:
        return place(found, kind, chance)  # an image without padding
    return path, chance.randrange(start, stop), f"{row['image']:06d}" if kind != "end" else None


def flip(path, at, chance):
    data = bytearray(path.read_bytes())
    data[at] ^= chance.randrange(1, 256)
    path.write_bytes(data)
    return data


def cases():
    return [(kind, number) for kind, count in FLIPS.items() for number in range(count) if kind != "decoded"]


def test_there_are_a_hundred():
    assert sum(FLIPS.values()) == 100


@pytest.mark.parametrize(("kind", "number"), cases())
def test_no_byte_changes_unseen(sound, tmp_path, kind, number):
    chance = random.Random(f"{kind} {number}")
    expected = read(sound.directory)
    found = manifest.read(shutil.copytree(sound.directory, tmp_path / "set"))
    path, at, key = place(found, kind, chance)
    before, after = path.read_bytes(), flip(path, at, chance)

    if kind == "manifest":
        for reader in (read, lambda directory: verify(directory, deep=True, quiet=True)):
            with pytest.raises(ShardError, match=r"manifest.json: damaged or of another version"):
                reader(found.directory)
        return

    faults = verify(found.directory, deep=True, quiet=True)
    assert faults[0] == f"{path.name}: its sha256 is not the one in the manifest"
    if kind in ("image header", "image", "json header", "json") and not same_header(before, after, at, kind):
        assert any(fault.startswith(f"{path.name}: sample {key} ") for fault in faults[1:])

    if kind in ("image", "index", "labels"):
        with pytest.raises(ShardError, match=path.name) as caught:
            read(found.directory)
        assert key is None or f"image {key} at byte" in str(caught.value)
    else:  # headers, json and padding are not read in training
        assert all(np.array_equal(a, b) for a, b in zip(read(found.directory), expected, strict=True))


def same_header(before, after, at, kind):
    """Whether a changed header says what it said: in some fields 0 and blank are the same."""
    if "header" not in kind:
        return False
    start = at // 512 * 512
    try:
        old, new = (
            tarfile.TarInfo.frombuf(bytes(data[start : start + 512]), "utf-8", "strict") for data in (before, after)
        )
    except tarfile.HeaderError:
        return False
    return old.get_info() == new.get_info()


@pytest.mark.parametrize("number", range(FLIPS["decoded"]))
def test_no_byte_of_the_decoded_images_changes_unseen(sound, tmp_path, number):
    def open_train():
        reader = Reader(Library(str(sound.directory), tmp_path), "train", size=16, crop=None, threads=2)
        return open_store(reader, kind="host", cache=tmp_path, device=torch.device("cpu"), announce=lambda line: None)

    pixels = open_train().gather(np.arange(23)).numpy().copy()
    [path] = tmp_path.glob(f"*/{PIXELS}")
    chance = random.Random(number)
    flip(path, chance.randrange(path.stat().st_size), chance)
    with pytest.raises(ShardError, match=f"{PIXELS}: the decoded images are corrupt"):
        open_train()
    path.unlink()
    assert np.array_equal(open_train().gather(np.arange(23)).numpy(), pixels)
