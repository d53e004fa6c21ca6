import fcntl
import io
import os
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import republish
from PIL import Image
from tiny_set import HEIGHT, WIDTH, pack_tiny, photograph, spoil
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from shards import lock
from shards.manifest import Manifest, ShardError, read
from vaedist.data import Config
from vaedist.data.store import PIXELS, SIDECAR, HostStore, Store, TarStore, open_store


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("set") / "tiny")


@pytest.fixture
def own(packed, tmp_path) -> Manifest:
    """A copy that a test may damage."""
    return read(shutil.copytree(packed.directory, tmp_path / "own"))


def opened(manifest: Manifest, cache: Path, *, kind="host", said=None) -> Store:
    announce = (lambda line: None) if said is None else said.append
    return open_store(manifest, "train", size=16, crop=28, kind=kind, cache=cache, announce=announce)


def everything(store: Store) -> torch.Tensor:
    return store.gather(np.arange(store.count))


def fill_disk(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free))


def run(script: str, *words: object, **kwargs) -> subprocess.Popen:
    preamble = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    command = [sys.executable, "-c", preamble + script, *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **kwargs)


def square(image: int, crop: int | None, size: int) -> Image.Image:
    """As a user of PIL and torchvision would cut and scale a photograph."""
    photo = Image.open(io.BytesIO(photograph(image)))
    return resize(center_crop(photo, [crop or min(HEIGHT, WIDTH)] * 2), [size, size], antialias=True)


def scaled(image: int, crop: int | None, size: int) -> torch.Tensor:
    """As a user of torchvision's tensors would."""
    photo = pil_to_tensor(Image.open(io.BytesIO(photograph(image))))
    return resize(center_crop(photo, [crop or min(HEIGHT, WIDTH)] * 2), [size, size], antialias=True)


def test_images_are_cropped_and_scaled_as_torchvision_does_and_within_1_of_pil(packed):
    for crop, size in [(28, 16), (31, 13), (None, 31), (20, 20), (9, 24)]:
        store = TarStore(packed, "train", size=size, crop=crop)
        images = everything(store)
        assert images.shape == (23, 3, size, size)
        for image, ours in enumerate(images, 1):
            assert torch.equal(ours, scaled(image, crop, size)), (crop, size, image)
            difference = ours.int() - pil_to_tensor(square(image, crop, size)).int()
            assert difference.abs().max() <= 1, (crop, size, image)


def test_the_splits_are_stores_of_their_own(packed):
    valid = TarStore(packed, "valid", size=16, crop=28)
    assert valid.count == 5
    assert torch.equal(valid.gather(np.array([0]))[0], scaled(24, 28, 16))


def test_both_stores_give_the_same_bits_in_any_order_and_with_repetitions(packed, tmp_path):
    tar, host = opened(packed, tmp_path, kind="tar"), opened(packed, tmp_path)
    assert isinstance(tar, TarStore)
    assert isinstance(host, HostStore)
    assert tar.count == host.count == 23
    assert tar.shape == host.shape == (3, 16, 16)
    ids = np.random.default_rng(0).integers(0, 23, 100)
    assert torch.equal(tar.gather(ids), host.gather(ids))
    for store in (tar, host):
        out = torch.zeros(100, 3, 16, 16, dtype=torch.uint8)
        assert store.gather(ids, out=out) is out
        assert torch.equal(out, host.gather(ids))
        assert store.gather(ids[:0]).shape == (0, 3, 16, 16)


def test_a_corrupt_payload_is_an_error_that_names_shard_image_and_place(own):
    place = spoil(own, 17)
    store = TarStore(own, "train", size=16, crop=28)
    assert store.gather(np.array([16, 18])).shape == (2, 3, 16, 16)
    with pytest.raises(ShardError) as error:
        everything(store)
    assert str(error.value).startswith(place)
    assert f"python -m shards verify {own.directory}" in str(error.value)


def test_a_payload_that_is_no_image_is_an_error_even_if_its_checksum_is_right(own):
    index = np.load(own.directory / "train.index.npy")
    shard, offset, length, _, image = index[3].item()
    path = own.shard_path("train", shard)
    data = bytearray(path.read_bytes())
    data[offset : offset + length] = bytes(length)
    path.write_bytes(data)
    index["crc32"][3] = zlib.crc32(bytes(length))
    republish(own, "train", "index", index)
    with pytest.raises(ShardError, match=f"image {image:06d} at byte {offset} is corrupt: "):
        everything(TarStore(read(own.directory), "train", size=16, crop=28))


def test_a_truncated_shard_is_refused_when_the_set_is_opened(own):
    path = own.shard_path("train", 1)
    os.truncate(path, path.stat().st_size - 512)
    with pytest.raises(ShardError, match=str(path)):
        TarStore(own, "train", size=16, crop=28)


def test_a_crop_larger_than_the_images_is_refused(packed):
    with pytest.raises(ShardError, match=r"data.crop=32 is larger than the images of .*tiny: 31 x 37"):
        TarStore(packed, "train", size=16, crop=32)


def test_a_cache_is_decoded_once_and_used_ever_after(packed, tmp_path):
    said: list[str] = []
    first = everything(opened(packed, tmp_path, said=said))
    assert ["decoding once" in line for line in said] == [True, False]
    said.clear()
    assert torch.equal(everything(opened(packed, tmp_path, kind="auto", said=said)), first)
    assert ["23 decoded images" in line for line in said] == [True]


def test_what_changes_the_bits_makes_another_cache(packed, tmp_path):
    for size, crop in [(16, 28), (16, 24), (8, 28)]:
        store = open_store(
            packed, "train", size=size, crop=crop, kind="host", cache=tmp_path, announce=lambda line: None
        )
        assert torch.equal(everything(store), everything(TarStore(packed, "train", size=size, crop=crop)))
    assert len(list(tmp_path.glob(f"*/{PIXELS}"))) == 3


@pytest.mark.parametrize("damage", ["shortened", "described otherwise", "no longer described", "not JSON"])
def test_a_cache_that_disagrees_with_its_description_is_decoded_again(packed, tmp_path, damage):
    store = opened(packed, tmp_path)
    whole, sidecar = everything(store).clone(), store.path.with_name(SIDECAR)
    if damage == "shortened":
        os.truncate(store.path, 1000)
    elif damage == "described otherwise":
        sidecar.write_text(sidecar.read_text().replace('"train"', '"valid"'))
    elif damage == "no longer described":
        sidecar.unlink()
    else:
        sidecar.write_text("[")
    said: list[str] = []
    assert torch.equal(everything(opened(packed, tmp_path, said=said)), whole)
    assert said[0].startswith(str(store.path.parent))
    assert said[0].endswith("; decoding again")


def test_a_cache_whose_bits_have_changed_is_refused(packed, tmp_path):
    store = opened(packed, tmp_path)
    data = bytearray(store.path.read_bytes())
    data[5000] ^= 1
    store.path.write_bytes(data)
    with pytest.raises(ShardError, match=f"{store.path}: the decoded images are corrupt; delete this file"):
        opened(packed, tmp_path)


def test_without_room_auto_decodes_from_the_tars_and_says_why(packed, tmp_path, monkeypatch):
    fill_disk(monkeypatch, free=2**30)
    said: list[str] = []
    assert isinstance(opened(packed, tmp_path, kind="auto", said=said), TarStore)
    assert len(said) == 1
    assert "1,074 MB free" in said[0]
    with pytest.raises(ShardError, match="no room"):
        opened(packed, tmp_path, kind="host")


def test_a_built_cache_needs_no_room(packed, tmp_path, monkeypatch):
    opened(packed, tmp_path)
    fill_disk(monkeypatch, free=0)
    assert isinstance(opened(packed, tmp_path, kind="auto"), HostStore)


def test_a_cache_folder_that_cannot_be_made_is_refused(packed, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match="cannot be written"):
        opened(packed, tmp_path / "file" / "cache")


def test_processes_that_open_a_cold_cache_together_decode_once(packed, tmp_path):
    script = """
import numpy as np, zlib
from pathlib import Path
from shards.manifest import read
from vaedist.data.store import open_store
print("ready", flush=True)
input()
store = open_store(read(sys.argv[1]), "train", size=16, crop=28, kind="auto", cache=Path(sys.argv[2]), announce=print)
print("crc32", zlib.crc32(store.gather(np.arange(store.count)).numpy()))
"""
    processes = [run(script, packed.directory, tmp_path) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    said = [line for process in processes for line in process.communicate("\n")[0].splitlines()]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("decoding once" in line for line in said) == 1
    right = zlib.crc32(everything(opened(packed, tmp_path, kind="tar")).numpy())
    assert [line for line in said if line.startswith("crc32")] == [f"crc32 {right}"] * 2


def test_whoever_waits_for_another_process_says_so_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0)
    said: list[str] = []
    with (tmp_path / "lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def announce(line):
            said.append(line)
            fcntl.flock(other, fcntl.LOCK_UN)

        with lock.exclusive(tmp_path / "lock", announce):
            assert said == [f"waiting for another process or thread of this node, which holds {tmp_path / 'lock'}"]


def test_a_killed_build_leaves_nothing_that_could_be_taken_for_whole(packed, tmp_path):
    script = """
import os, signal
from pathlib import Path
from shards.manifest import read
from vaedist.data import store
store.CHUNK, decode = 8, store.TarStore.gather
say = lambda line: print(line, flush=True)  # before the kill
def gather(self, ids, out=None):
    if ids[0] >= 16:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(self, ids, out)
store.TarStore.gather = gather
store.open_store(read(sys.argv[1]), "train", size=16, crop=28, kind="host", cache=Path(sys.argv[2]), announce=say)
"""
    process = run(script, packed.directory, tmp_path)
    assert "decoding once" in process.communicate()[0]
    assert process.returncode == -9
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".draft", ".lock"]
    assert torch.equal(everything(opened(packed, tmp_path)), everything(opened(packed, tmp_path, kind="tar")))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]


def test_a_build_that_fails_leaves_only_its_lock(own, tmp_path):
    spoil(own, 2)
    with pytest.raises(ShardError, match="is corrupt"):
        opened(own, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_config_opens_its_data_set(packed, tmp_path):
    config = Config(shards=packed.directory, size=16, crop=28, cache=tmp_path)
    dataset = config.open(config.find(print), lambda line: None)
    assert dataset.train.shape == dataset.valid.shape == (3, 16, 16)
    assert (dataset.train.count, dataset.valid.count) == (23, 5)
    assert dataset.digest == packed.digest
    assert torch.equal(everything(dataset.train), everything(opened(packed, tmp_path, kind="tar")))


def test_a_missing_data_set_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(ShardError, match=rf"{tmp_path}/none: .*python -m shards pack celeba SRC {tmp_path}/none"):
        Config(shards=tmp_path / "none").find(lambda line: None)


def test_a_config_may_draw_its_data_set_once(tmp_path, capsys):
    config = Config(shards=tmp_path / "faces", draw=20, size=16, cache=tmp_path / "cache")
    manifest = config.find(lambda line: None)
    assert "packed 20 images" in capsys.readouterr().out
    assert config.find(lambda line: None).digest == manifest.digest
    assert capsys.readouterr().out == ""
    assert sum(split.count for split in manifest.splits.values()) == 20
    assert config.open(manifest, lambda line: None).train.gather(np.array([0])).shape == (1, 3, 16, 16)
    with pytest.raises(ShardError, match=r"holds another data set .*; to train on what is there, say data\.draw=0"):
        replace(config, draw=30).find(lambda line: None)
