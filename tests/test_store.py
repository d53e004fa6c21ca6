import io
import os
import shutil
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import republish
from PIL import Image
from tiny_set import HEIGHT, WIDTH, pack_tiny, photograph, spoil
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from shards import image, manifest
from shards.manifest import Manifest, ShardError, read
from shards.reading import decoded
from shards.reading.decoded import PIXELS, SIDECAR
from shards.reading.library import Library
from shards.reading.reader import Reader
from vaedist.config import ConfigError
from vaedist.data import Config
from vaedist.data.store import DeviceStore, HostStore, Store, TarStore, open_store

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("set") / "tiny")


@pytest.fixture
def own(packed, tmp_path) -> Manifest:
    """A copy that a test may damage."""
    return read(shutil.copytree(packed.directory, tmp_path / "own"))


def reader(manifest: Manifest, *, split="train", size=16, crop: int | None = 28) -> Reader:
    return Reader(Library(str(manifest.directory), Path()), split, size=size, crop=crop, threads=2)


def opened(manifest: Manifest, cache: Path, *, kind="host", said=None, **cut) -> Store:
    announce = (lambda line: None) if said is None else said.append
    return open_store(reader(manifest, **cut), kind=kind, cache=cache, device=CPU, announce=announce)


def pixels(cache: Path) -> Path:
    """The one decoded split in a cache."""
    (path,) = cache.glob(f"*/{PIXELS}")
    return path


def everything(store: Store) -> torch.Tensor:
    return store.gather(np.arange(store.count))


def fill_disk(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - free, free))


def run(script: str, *words: object, **kwargs) -> subprocess.Popen:
    preamble = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    command = [sys.executable, "-c", preamble + script, *map(str, words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **kwargs)


def test_images_are_cropped_and_scaled_as_torchvision_does(packed):
    for crop, size in [(28, 16), (31, 13), (None, 31), (20, 20), (9, 24)]:
        store = TarStore(reader(packed, size=size, crop=crop))
        images = everything(store)
        assert images.shape == (23, 3, size, size)
        for number, ours in enumerate(images, 1):
            photo = Image.open(io.BytesIO(photograph(number)))
            square = center_crop(photo, [crop or min(HEIGHT, WIDTH)] * 2)
            assert torch.equal(ours, resize(pil_to_tensor(square), [size, size], antialias=True)), (crop, size, number)
            pil = pil_to_tensor(resize(square, [size, size], antialias=True))
            assert (ours.int() - pil.int()).abs().max() <= 1


def test_the_splits_are_stores_of_their_own(packed):
    valid = TarStore(reader(packed, split="valid"))
    photo = center_crop(Image.open(io.BytesIO(photograph(24))), [28, 28])
    assert valid.count == 5
    assert torch.equal(valid.gather(np.array([0]))[0], resize(pil_to_tensor(photo), [16, 16], antialias=True))


def test_all_stores_give_the_same_bits_in_any_order_and_with_repetitions(packed, tmp_path):
    tar, host, device = (opened(packed, tmp_path, kind=kind) for kind in ("tar", "host", "device"))
    assert [type(store) for store in (tar, host, device)] == [TarStore, HostStore, DeviceStore]
    assert tar.count == host.count == device.count == 23
    assert tar.shape == host.shape == device.shape == (3, 16, 16)
    assert host.digest == device.digest != tar.digest is None
    ids = np.random.default_rng(0).integers(0, 23, 100)
    assert torch.equal(tar.gather(ids), host.gather(ids))
    for store in (tar, host, device):
        out = torch.zeros(100, 3, 16, 16, dtype=torch.uint8)
        assert store.gather(ids, out=out) is out
        assert torch.equal(out, host.gather(ids))
        assert store.gather(ids[:0]).shape == (0, 3, 16, 16)


def test_decoding_and_scaling_let_other_threads_work():
    photo = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    stream = io.BytesIO()
    Image.fromarray(photo).save(stream, "JPEG")
    for work in (lambda: image.decode(stream.getvalue(), 3), lambda: image.scale([photo], 3000)):
        thread, pauses = threading.Thread(target=work), [time.perf_counter()]
        thread.start()
        while thread.is_alive():
            pauses.append(time.perf_counter())
        lasted = pauses[-1] - pauses[0]
        assert np.diff(pauses).max() < lasted / 2


def test_a_corrupt_payload_is_an_error_that_names_shard_image_and_place(own):
    place = spoil(own, 17)
    store = TarStore(reader(own))
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
        everything(TarStore(reader(own)))


def test_a_truncated_shard_is_refused_when_the_set_is_opened(own):
    path = own.shard_path("train", 1)
    os.truncate(path, path.stat().st_size - 512)
    with pytest.raises(ShardError, match=str(path)):
        TarStore(reader(own))


def test_a_crop_larger_than_the_images_is_refused(packed):
    with pytest.raises(ShardError, match=r"tiny: data.crop=32 is larger than its images, 31 x 37"):
        reader(packed, crop=32)


def test_a_cache_is_decoded_once_and_used_ever_after(packed, tmp_path):
    said: list[str] = []
    first = everything(opened(packed, tmp_path, said=said))
    assert ["decoding once" in line for line in said] == [True, False]
    said.clear()
    assert torch.equal(everything(opened(packed, tmp_path, kind="auto", said=said)), first)
    assert said == [f"store host: 23 images of train, 0 MB decoded, from {pixels(tmp_path).parent}"]


def test_what_changes_the_bits_makes_another_cache(packed, tmp_path):
    for size, crop in [(16, 28), (16, 24), (8, 28)]:
        store = opened(packed, tmp_path, size=size, crop=crop)
        assert torch.equal(everything(store), everything(TarStore(reader(packed, size=size, crop=crop))))
    assert len(list(tmp_path.glob(f"*/{PIXELS}"))) == 3


@pytest.mark.parametrize("damage", ["shortened", "described otherwise", "no longer described", "not JSON"])
def test_a_cache_that_disagrees_with_its_description_is_decoded_again(packed, tmp_path, damage):
    store = opened(packed, tmp_path)
    whole, path = everything(store).clone(), pixels(tmp_path)
    sidecar = path.with_name(SIDECAR)
    if damage == "shortened":
        os.truncate(path, 1000)
    elif damage == "described otherwise":
        sidecar.write_text(sidecar.read_text().replace('"train"', '"valid"'))
    elif damage == "no longer described":
        sidecar.unlink()
    else:
        sidecar.write_text("[")
    said: list[str] = []
    assert torch.equal(everything(opened(packed, tmp_path, said=said)), whole)
    assert said[0].startswith(str(path.parent))
    assert said[0].endswith("; decoding again")


def test_a_cache_whose_bits_have_changed_is_refused(packed, tmp_path):
    opened(packed, tmp_path)
    path = pixels(tmp_path)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=f"{path}: the decoded images are corrupt; delete this file"):
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


HELPERS = """
import os, signal, time, zlib
import numpy as np
from pathlib import Path
from shards.reading import decoded
from shards import image, manifest
from shards.reading.library import Library
from shards.reading.reader import Reader
reader = Reader(Library(sys.argv[1], Path()), "train", size=16, crop=28, threads=1)
decode = decoded._decode_part
print("ready", flush=True)
"""


def test_processes_that_open_a_cold_cache_together_share_the_work(packed, tmp_path):
    """Each shard is decoded by one of them; here each process waits until the other has one too."""
    script = """
input()
def slowly(reader, draft, part, first, soon):
    before = set(draft.glob("*.json"))
    decode(reader, draft, part, first, soon)
    if (draft / f"{part:06d}.json") in set(draft.glob("*.json")) - before:
        print("part", part)
        time.sleep(0.3)
decoded._decode_part = slowly
images = decoded.decoded(reader, Path(sys.argv[2]), print, quiet=True)
print("crc32", zlib.crc32(images.pixels))
"""
    processes = [run(HELPERS + script, packed.directory, tmp_path) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    parts = [[line for line in lines if line.startswith("part")] for lines in said]
    assert all(parts)
    assert sorted(chain(*parts)) == [f"part {k}" for k in range(len(packed.split("train").shards))]
    together = list(chain(*said))
    assert sum("decoding once" in line for line in together) == 1
    right = zlib.crc32(everything(opened(packed, tmp_path, kind="tar")).numpy())
    assert [line for line in together if line.startswith("crc32")] == [f"crc32 {right}"] * 2


def test_a_killed_build_goes_on_with_the_shards_that_it_had_not_decoded(packed, tmp_path):
    script = """
def until_the_third(reader, draft, part, first, soon):
    if part == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    decode(reader, draft, part, first, soon)
decoded._decode_part = until_the_third
decoded.decoded(reader, Path(sys.argv[2]), print, quiet=True)
"""
    process = run(HELPERS + script, packed.directory, tmp_path)
    process.communicate()
    assert process.returncode == -9
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".draft", ".lock"]
    (draft,) = tmp_path.glob("*.draft")
    marks = {path: path.stat().st_mtime_ns for path in draft.glob("0*.json")}
    assert len(marks) == 2
    said: list[str] = []
    resumed = decoded.decoded(reader(packed), tmp_path, said.append, quiet=True)
    assert said == []
    assert np.array_equal(resumed.pixels, everything(opened(packed, tmp_path, kind="tar")).numpy())
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".lock"]
    assert sorted(path.name for path in resumed.path.parent.iterdir()) == sorted([PIXELS, SIDECAR])


def test_a_build_killed_after_its_last_shard_is_finished_by_the_next(packed, tmp_path):
    script = """
decoded._finish = lambda folder, identity: os.kill(os.getpid(), signal.SIGKILL)
decoded.decoded(reader, Path(sys.argv[2]), print, quiet=True)
"""
    process = run(HELPERS + script, packed.directory, tmp_path)
    process.communicate()
    assert process.returncode == -9
    assert len(list(tmp_path.glob("*.draft/0*.json"))) == len(packed.split("train").shards)
    resumed = decoded.decoded(reader(packed), tmp_path, lambda line: None, quiet=True)
    assert np.array_equal(resumed.pixels, everything(opened(packed, tmp_path, kind="tar")).numpy())


def test_a_build_that_fails_leaves_nothing_under_its_final_name_and_goes_on_when_the_set_is_mended(
    own, packed, tmp_path
):
    path = own.shard_path("train", 0)
    whole = path.read_bytes()
    spoil(own, 2)
    with pytest.raises(ShardError, match="is corrupt"):
        opened(own, tmp_path / "cache")
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".draft", ".lock"]
    path.write_bytes(whole)
    assert torch.equal(everything(opened(own, tmp_path / "cache")), everything(TarStore(reader(packed))))


def test_a_config_opens_its_data_set(packed, tmp_path):
    config = Config(shards=str(packed.directory), size=16, crop=28, cache=tmp_path)
    dataset = config.open(config.find(print), lambda line: None)
    assert dataset.train.shape == dataset.valid.shape == (3, 16, 16)
    assert (dataset.train.count, dataset.valid.count) == (23, 5)
    assert dataset.digest == packed.digest
    assert torch.equal(everything(dataset.train), everything(opened(packed, tmp_path, kind="tar")))


def test_a_window_needs_the_store_that_can_do_with_a_part_of_the_set(packed, tmp_path):
    config = Config(shards=str(packed.directory), size=16, crop=28, cache=tmp_path, window=2)
    with pytest.raises(ConfigError, match=r"data\.window is for sets larger than the disk: it needs data\.store=tar"):
        config.open(config.find(print), print)
    dataset = replace(config, store="tar").open(config.find(print), lambda line: None)
    positions = np.arange(dataset.train.count)
    assert sorted(dataset.order(0).take(positions).tolist()) == positions.tolist()
    now, soon = dataset.order(0).shards(positions[:1])
    assert 1 <= len(now) <= 2
    assert 1 <= len(soon) <= 2


def test_an_evaluation_on_training_images_does_not_read_through_the_windows(tmp_path):
    found = pack_tiny(tmp_path / "set", train=20)
    bare = manifest.write(replace(found, splits={"train": found.splits["train"]}))
    config = Config(shards=str(bare.directory), size=16, crop=28, cache=tmp_path, store="tar", window=1)
    dataset = config.open(config.find(print), lambda line: None)
    assert dataset.valid is not dataset.train
    assert torch.equal(dataset.valid.gather(np.arange(20)), dataset.train.gather(np.arange(20)))


def test_a_missing_data_set_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(ShardError, match=rf"{tmp_path}/none: .*python -m shards pack celeba SRC {tmp_path}/none"):
        Config(shards=str(tmp_path / "none")).find(lambda line: None)


def test_a_config_may_draw_its_data_set_once(tmp_path, capsys):
    config = Config(shards=str(tmp_path / "faces"), draw=20, size=16, cache=tmp_path / "cache")
    library = config.find(lambda line: None)
    manifest = library.manifest
    assert "packed 20 images" in capsys.readouterr().out
    assert config.find(lambda line: None).manifest.digest == manifest.digest
    assert capsys.readouterr().out == ""
    assert sum(split.count for split in manifest.splits.values()) == 20
    assert config.open(library, lambda line: None).train.gather(np.array([0])).shape == (1, 3, 16, 16)
    with pytest.raises(ShardError, match=r"holds another data set .*; to train on what is there, say data\.draw=0"):
        replace(config, draw=30).find(lambda line: None)
