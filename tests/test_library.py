"""Sets that do not lie on this machine, from a real web server."""

import json
import subprocess
import sys
import zlib
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from http_server import Server, serving
from tiny_set import pack_tiny

from shards import manifest
from shards.manifest import Manifest, ShardError
from shards.packing.plan import Options
from shards.reading.decoded import decoded
from shards.reading.library import Library
from shards.reading.reader import Reader
from shards.remote import fetch
from vaedist.data import Config
from vaedist.data.stream import Stream


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("set") / "tiny", train=40)


@pytest.fixture
def server(packed):
    with serving() as server:
        publish(server, packed)
        yield server


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(fetch, "BACKOFF", 0.001)


def publish(server: Server, found: Manifest) -> None:
    server.files = {f"/set/{path.name}": path.read_bytes() for path in found.directory.iterdir()}


def reader(location: str, cache: Path, **options) -> Reader:
    return Reader(Library(location, cache, announce=lambda line: None, **options), "train", size=16, crop=28, threads=2)


def everything(reader: Reader) -> np.ndarray:
    return reader.read(np.arange(reader.count))


def shards(found: Manifest) -> list[str]:
    return [f"/set/{shard.name}" for shard in found.split("train").shards]


def test_a_set_behind_a_url_gives_the_pixels_of_the_set_itself(packed, server, tmp_path):
    far, near = reader(f"{server.url}/set", tmp_path), reader(str(packed.directory), tmp_path)
    assert far.library.manifest.digest == packed.digest
    assert [server.gets[name] for name in shards(packed)] == [0] * len(
        shards(packed)
    )  # a shard comes when it is needed
    assert np.array_equal(everything(far), everything(near))
    assert [server.wholes[name] for name in shards(packed)] == [1] * len(shards(packed))
    far.library.close()
    again = reader(f"{server.url}/set", tmp_path)
    assert np.array_equal(everything(again), everything(near))
    assert [server.wholes[name] for name in shards(packed)] == [1] * len(shards(packed))
    assert server.wholes["/set/train.index.npy"] == 1
    again.library.close()


def test_a_set_on_a_shared_disk_is_copied_to_the_nodes_own(packed, tmp_path):
    far, near = reader(f"file://{packed.directory}", tmp_path), reader(str(packed.directory), tmp_path)
    assert np.array_equal(everything(far), everything(near))
    copied = {path.stat().st_size for path in (tmp_path / "shards").rglob("*") if path.is_file()}
    assert {shard.bytes for shard in packed.split("train").shards} <= copied
    far.library.close()


def test_a_set_that_is_packed_anew_behind_the_same_url_is_noticed(packed, server, tmp_path):
    reader(f"{server.url}/set", tmp_path)
    other = pack_tiny(tmp_path / "other", train=20)
    publish(server, other)
    assert reader(f"{server.url}/set", tmp_path).library.manifest.digest == other.digest


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda files: files.pop("/set/manifest.json"), "manifest.json: "),
        (lambda files: files.update({"/set/manifest.json": b"{}"}), "damaged or of another version"),
        (lambda files: files.update({"/set/train.index.npy": files["/set/valid.index.npy"]}), "train.index.npy: "),
    ],
)
def test_a_set_that_is_not_whole_behind_its_url_is_one_line(packed, server, tmp_path, change, line):
    change(server.files)
    with pytest.raises(ShardError) as error:
        Library(f"{server.url}/set", tmp_path, announce=print)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../../outside.npy", "/outside.npy", "sub/outside.npy"])
def test_a_manifest_cannot_name_files_outside_of_its_set(packed, server, tmp_path, name):
    fields = json.loads(server.files["/set/manifest.json"])
    fields["splits"]["train"]["arrays"]["index"]["name"] = name
    del fields["checksum"]
    server.files["/set/manifest.json"] = manifest._encode(fields)
    before = set(tmp_path.parent.rglob("outside*"))
    with pytest.raises(ShardError, match="is no name of a file in this directory"):
        Library(f"{server.url}/set", tmp_path, announce=print)
    assert set(tmp_path.parent.rglob("outside*")) == before


@pytest.mark.parametrize("name", ["-rf", "a b.tar", "a;b.tar", "a$b.tar"])
def test_a_set_behind_a_url_has_plain_names(packed, server, tmp_path, name):
    fields = json.loads(server.files["/set/manifest.json"])
    fields["splits"]["train"]["shards"][0]["name"] = name
    del fields["checksum"]
    server.files["/set/manifest.json"] = manifest._encode(fields)
    with pytest.raises(ShardError, match="such a name is not fetched"):
        Library(f"{server.url}/set", tmp_path, announce=print)


@pytest.mark.parametrize("name", ["/etc/passwd", "file:///etc/passwd", "FILE:///etc/passwd"])
def test_a_set_behind_a_url_cannot_name_files_of_this_disk(packed, server, tmp_path, name):
    elsewhere(packed, tmp_path / "index", name)
    server.files = {f"/set/{path.name}": path.read_bytes() for path in (tmp_path / "index").iterdir()}
    with pytest.raises(ShardError, match=f"its manifest names the file {name} of whoever made it"):
        Library(f"{server.url}/set", tmp_path / "cache", announce=print)


def elsewhere(packed: Manifest, directory: Path, url: str) -> None:
    """A manifest on this disk whose shards are at URLs; {name} in `url` is a shard's name."""
    directory.mkdir()
    for path in packed.directory.glob("*.npy"):
        (directory / path.name).write_bytes(path.read_bytes())
    splits = {
        name: replace(split, shards=tuple(replace(s, url=url.replace("{name}", s.name)) for s in split.shards))
        for name, split in packed.splits.items()
    }
    manifest.write(replace(packed, directory=directory, splits=splits))


def test_the_shards_of_a_set_on_this_disk_may_lie_elsewhere(packed, server, tmp_path):
    elsewhere(packed, tmp_path / "index", f"{server.url}/set/{{name}}")
    far = reader(str(tmp_path / "index"), tmp_path / "cache")
    assert np.array_equal(everything(far), everything(reader(str(packed.directory), tmp_path)))
    assert server.wholes["/set/train.index.npy"] == 0
    far.library.close()


def test_commands_of_a_manifest_are_run_only_if_the_user_says_so(packed, tmp_path):
    elsewhere(packed, tmp_path / "index", f"pipe:touch {tmp_path}/ran; cat {packed.directory}/{{name}}")
    with pytest.raises(ShardError, match=r"manifest.json: names a command \(pipe:touch .*\); write it"):
        everything(reader(str(tmp_path / "index"), tmp_path / "cache"))
    assert not (tmp_path / "ran").exists()
    allowed = reader(str(tmp_path / "index"), tmp_path / "cache", pipe=True)
    assert np.array_equal(everything(allowed), everything(reader(str(packed.directory), tmp_path)))
    allowed.library.close()


def test_a_command_may_give_a_whole_set(packed, tmp_path):
    piped = reader(f"pipe:cat {packed.directory}/{{name}}", tmp_path)
    assert np.array_equal(everything(piped), everything(reader(str(packed.directory), tmp_path)))
    piped.library.close()


def test_a_shard_that_stays_bad_is_one_line_with_its_url_and_bytes(packed, server, tmp_path):
    bad = shards(packed)[3]
    server.files[bad] = server.files[bad][:-512]
    far = reader(f"{server.url}/set", tmp_path)
    size = packed.split("train").shards[3].bytes
    with pytest.raises(ShardError, match=rf"{server.url}{bad}: {size - 512:,} of {size:,} bytes came; gave up after 6"):
        everything(far)
    far.library.close()


def test_four_processes_decode_a_set_whose_shards_all_fail_twice_after_one_download_each(server, tmp_path):
    packed = pack_tiny(tmp_path / "npy", train=60, options=Options(shard_mb=0.03, npy=16, crop=28))  # needs no torch
    publish(server, packed)
    script = """
import sys, zlib
from pathlib import Path
from shards.remote import fetch
from shards.reading.decoded import decoded
from shards.reading.library import Library
from shards.reading.reader import Reader
fetch.BACKOFF = 0.001
library = Library(sys.argv[1], Path(sys.argv[2]), announce=lambda line: None)
reader = Reader(library, "train", size=16, crop=28, threads=1)
print(zlib.crc32(decoded(reader, Path(sys.argv[2]), print, quiet=True).pixels))
library.close()
"""
    for name in shards(packed):
        server.faults[name].extend(["503", "short"])
    command = [sys.executable, "-c", script, f"{server.url}/set", str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = list(chain(*(process.communicate()[0].splitlines() for process in processes)))
    assert [process.returncode for process in processes] == [0] * 4
    right = zlib.crc32(everything(reader(str(packed.directory), tmp_path)))
    assert [line for line in said if "decoding" not in line] == [str(right)] * 4
    assert [(server.gets[name], server.wholes[name]) for name in shards(packed)] == [(3, 1)] * len(shards(packed))


def held(cache: Path) -> int:
    """Bytes of the shards in a cache, from which some may be vanishing."""
    total = 0
    for path in cache.glob("*.tar"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_a_window_needs_no_more_disk_than_itself_and_the_next(packed, server, tmp_path, monkeypatch):
    """Two epochs from a cache that holds a part of the set: the same images as from the disk, fetched in order."""
    monkeypatch.setattr("vaedist.data.EVALUATED", 0)
    sizes = [shard.bytes for shard in packed.split("train").shards]
    limit = 4 * max(sizes)
    config = Config(
        shards=f"{server.url}/set", store="tar", window=2, cache=tmp_path, cache_gb=limit / 1e9, size=16, crop=28
    )
    library = config.find(lambda line: None)
    data = config.open(library, lambda line: None, threads=2)
    order, near = data.order(5), reader(str(packed.directory), tmp_path)
    stream = Stream(data.train, [order], lambda seen: np.arange(seen, seen + 8)[None], 8, torch.device("cpu"))
    batches, largest = stream.batches(0), 0
    for _ in range(10):
        batch = next(batches)
        largest = max(largest, held(tmp_path / "shards"))
        assert np.array_equal(batch.images[0, 0].numpy(), near.read(order.take(batch.positions[0].numpy())))
    batches.close()
    library.close()
    assert limit / 2 < largest <= limit
    asked = [shards(packed).index(name) for name in server.order if name in shards(packed)]
    windows: list[list[int]] = []
    for position in range(40):
        now, _ = order.shards(np.array([position]))
        windows += [now] if now not in windows else []
    first, last = windows[0] + windows[1], len(packed.split("train").shards)
    assert set(asked[: len(first)]) == set(first)
    assert set(asked[len(first) : last]) == set(windows[2])


def test_a_limit_below_two_windows_is_refused_before_anything_is_fetched(packed, server, tmp_path):
    config = Config(shards=f"{server.url}/set", store="tar", window=3, cache=tmp_path, cache_gb=1e-5, size=16, crop=28)
    with pytest.raises(ShardError, match=r"of fetched shards are needed at one time, the limit is .* data\.window"):
        config.open(config.find(print), print)
    assert [server.gets[name] for name in shards(packed)] == [0] * len(shards(packed))


def test_an_evaluation_between_steps_keeps_no_shard(server, tmp_path, monkeypatch):
    """The cache has room for two windows of one shard and one shard of the evaluation, and for nothing else."""
    monkeypatch.setattr("vaedist.data.EVALUATED", 1)
    packed = pack_tiny(tmp_path / "set", train=40, valid=15)
    publish(server, packed)
    train, valid = (max(shard.bytes for shard in packed.split(name).shards) for name in ("train", "valid"))
    config = Config(shards=f"{server.url}/set", store="tar", window=1, cache=tmp_path / "cache", size=16, crop=28)
    config = replace(config, cache_gb=(2 * train + valid) / 1e9)
    library = config.find(lambda line: None)
    data = config.open(library, lambda line: None, threads=2)
    assert len(packed.split("valid").shards) > 1
    stream = Stream(data.train, [data.order(0)], lambda seen: np.arange(seen, seen + 4)[None], 4, torch.device("cpu"))
    batches = stream.batches(0)
    near = Reader(Library(str(packed.directory), tmp_path), "valid", size=16, crop=28, threads=2)
    for step in range(20):
        batch = next(batches)
        assert batch.images.shape[2] == 4
        if step % 5 == 0:
            for ids in np.split(np.arange(15), range(1, 15)):
                assert np.array_equal(data.valid.gather(ids).numpy(), near.read(ids))
    anywhere = np.random.default_rng(0).permutation(15)
    assert np.array_equal(data.valid.gather(anywhere).numpy(), near.read(anywhere))
    batches.close()
    library.close()


def test_two_streams_need_room_for_the_windows_of_both(packed, server, tmp_path):
    """FactorVAE reads two orders at once: what lasts for one would end such a run in the middle."""
    train, valid = (max(shard.bytes for shard in packed.split(name).shards) for name in ("train", "valid"))
    config = Config(shards=f"{server.url}/set", store="tar", window=1, cache=tmp_path, size=16, crop=28)
    config = replace(config, cache_gb=(2 * train + valid) / 1e9)
    config.open(config.find(print), print)
    with pytest.raises(ShardError, match=r"of fetched shards are needed at one time, the limit is .* data\.window"):
        config.open(config.find(print), print, streams=2)


def test_shards_that_are_decoded_make_room_for_those_of_other_splits(packed, server, tmp_path):
    library = Library(f"{server.url}/set", tmp_path, announce=lambda line: None)
    decoded(Reader(library, "train", size=16, crop=28, threads=1), tmp_path, print)
    assert library._cache is not None
    assert not any(library._cache._pins.values())
    library.close()


def test_a_set_can_be_fetched_and_decoded_before_a_job_starts(packed, server, tmp_path, capsys):
    from shards.__main__ import main

    words = ["warm", f"{server.url}/set", "--size", "16", "--crop", "28", "--cache", str(tmp_path)]
    assert main(words) == 0
    assert "train" in capsys.readouterr().out
    server.files.clear()
    publish(server, packed)
    server.files = {name: data for name, data in server.files.items() if not name.endswith(".tar")}
    config = Config(shards=f"{server.url}/set", cache=tmp_path, size=16, crop=28)
    data = config.open(config.find(print), print)
    near = everything(reader(str(packed.directory), tmp_path))
    assert np.array_equal(data.train.gather(np.arange(40)).numpy(), near)
    assert np.array_equal(decoded(reader(f"{server.url}/set", tmp_path), tmp_path, print).pixels, near)
