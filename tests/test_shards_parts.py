"""Packs in parts: whichever order, however often and wherever they run, the set is that of one pack."""

import itertools
import random
import subprocess
import sys
import time

import pytest
from tiny_celeba import SHARD_MB, contents, photograph, whole_source, write_source

from shards import image, manifest
from shards.__main__ import main
from shards.manifest import ShardError
from shards.packing import pack
from shards.packing.plan import Options, Part, plan
from shards.sources import celeba


@pytest.fixture
def source(tmp_path):
    return whole_source(tmp_path / "source")


@pytest.fixture
def expected(source, tmp_path):
    """What one pack writes."""
    pack_part(source, tmp_path / "whole", 0, 1)
    return contents(tmp_path / "whole")


def pack_part(source, dst, index, count, shard_mb=SHARD_MB):
    planned = plan("celeba", celeba.read(source), Options(shard_mb=shard_mb))
    return pack.pack_part(planned, dst, Part(index, count), workers=1, quiet=True)


@pytest.mark.parametrize("count", [2, 3])
def test_parts_in_any_order_are_byte_for_byte_one_pack_and_again_change_nothing(source, expected, tmp_path, count):
    for number, order in enumerate(itertools.permutations(range(count))):
        dst = tmp_path / str(number)
        for i in order[:-1]:
            assert pack_part(source, dst, i, count) is None
            assert "manifest.json" not in contents(dst)
        found = pack_part(source, dst, order[-1], count)
        assert contents(dst) == expected
        before = {path: path.stat().st_mtime_ns for path in dst.iterdir()}
        assert all(pack_part(source, dst, i, count) == found for i in order)
        assert {path: path.stat().st_mtime_ns for path in dst.iterdir()} == before


def test_of_more_parts_than_shards_some_have_nothing_to_do(source, expected, tmp_path):
    found = [pack_part(source, tmp_path / "set", i, 20) for i in reversed(range(20))]
    assert [part is None for part in found] == [True] * 19 + [False]
    assert contents(tmp_path / "set") == expected


def test_a_part_writes_only_its_own_shards_and_other_divisions_go_on_from_them(source, expected, tmp_path):
    dst = tmp_path / "set"
    tars = sorted(name for name in expected if name.endswith(".tar"))
    shards = [name for split in manifest.SPLITS for name in tars if name.startswith(split)]
    for _ in range(2):
        assert pack_part(source, dst, 1, 3) is None
        assert sorted(path.name for path in dst.glob("*.tar")) == sorted(shards[1::3])
    before = {path: path.stat().st_mtime_ns for path in dst.glob("*.tar")}
    assert pack_part(source, dst, 1, 2) is None
    pack_part(source, dst, 0, 1)
    assert contents(dst) == expected
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_log_of_each_part_says_what_it_did_and_what_lacks(source, expected, tmp_path, capsys):
    words = ["pack", "celeba", str(source), str(tmp_path / "set"), f"--shard-mb={SHARD_MB}", "--workers=1"]
    shards = sum(name.endswith(".tar") for name in expected)

    def said(*options):
        assert main([*words, *options]) == 0
        return capsys.readouterr().out.splitlines()

    assert said("--part=1/2", "--dry-run")[-1] == f"part 1/2: {shards // 2} of these shards"
    first, packed, end = said("--part=1/2")
    assert first.startswith("packing part 1/2, ")
    assert first.endswith(f"into {shards // 2} of {shards} shards in {tmp_path / 'set'}")
    assert f" MB in {shards // 2} shards: " in packed
    assert end.endswith(f"{shards - shards // 2} shards are not there yet; whichever part comes last finishes the set")
    assert f"{tmp_path / 'set'}: complete, train 20, valid 2, test 2; manifest " in said("--part=0/2")[-1]
    assert "already packed from this source" in said("--part=1/2")[0]
    for wrong in ("2/2", "1", "-1/2", "a/b", "0/0"):
        with pytest.raises(SystemExit):
            main([*words, f"--part={wrong}"])
        assert f"argument --part: {wrong} is no part; of two there are 0/2 and 1/2" in capsys.readouterr().err


def test_a_part_that_sees_other_images_than_the_others_is_told_so_and_packing_again_mends_it(source, tmp_path):
    dst, edited = tmp_path / "set", source / "img_align_celeba" / "000001.jpg"
    assert pack_part(source, dst, 0, 3) is None
    edited.write_bytes(photograph(1) + b"\0")  # of shard 0
    assert pack_part(source, dst, 1, 3) is None
    with pytest.raises(ShardError, match=r"train-00000.tar: not packed from the images and labels that part 2/3 sees"):
        pack_part(source, dst, 2, 3)
    assert "manifest.json" not in contents(dst)
    pack_part(source, dst, 0, 3)
    pack_part(source, tmp_path / "clean", 0, 1)
    assert contents(dst) == contents(tmp_path / "clean")

    edited.write_bytes(photograph(1))
    assert pack_part(source, dst, 1, 3) is not None  # which leaves the reading of all images to the first
    with pytest.raises(ShardError, match="it was packed from other images"):
        pack_part(source, dst, 0, 3)


def test_parts_with_other_options_are_refused_even_where_both_begin_at_once(source, tmp_path, monkeypatch):
    dst = tmp_path / "set"
    assert pack_part(source, dst, 0, 2) is None
    with pytest.raises(ShardError, match=r"another pack was begun here \(--shard-mb was 0.012, now it is 1\)"):
        pack_part(source, dst, 1, 2, shard_mb=1)
    write_shard, mark = pack.write_shard, dst / ".unfinished"

    def overtaken(job):
        mark.write_text(mark.read_text().replace(str(SHARD_MB), "1"))
        return write_shard(job)

    monkeypatch.setattr(pack, "write_shard", overtaken)
    with pytest.raises(ShardError, match=r"another pack was begun here \(--shard-mb was 1, now it is 0.012\)"):
        pack_part(source, dst, 1, 2)


def meanwhile(monkeypatch, name, event):
    """Lets `event` happen at the first call of a function of shards.image, which packing calls inside of a draft."""
    function, events = getattr(image, name), [event]

    def call(*arguments):
        if events:
            events.pop()()
        return function(*arguments)

    monkeypatch.setattr(image, name, call)
    return events


def test_of_two_that_finish_at_once_the_slower_finds_the_set_complete(source, expected, tmp_path, monkeypatch):
    dst, found = tmp_path / "set", []
    assert pack_part(source, dst, 0, 2) is None
    assert pack_part(source, dst, 1, 3) is None
    left = meanwhile(monkeypatch, "to_npy", lambda: found.append(pack_part(source, dst, 0, 2)))
    found.append(pack_part(source, dst, 1, 2))  # has its draft of an array removed under its hands
    assert left == []
    assert found[0] == found[1] is not None
    assert contents(dst) == expected


def test_of_the_same_part_begun_twice_the_later_goes_on(source, expected, tmp_path, monkeypatch):
    dst = tmp_path / "set"
    left = meanwhile(monkeypatch, "dimensions", lambda: pack_part(source, dst, 0, 2))
    with pytest.raises(ShardError, match="the same was begun once more, and goes on there; this one ends"):
        pack_part(source, dst, 0, 2)
    assert left == []
    pack_part(source, dst, 1, 2)
    assert contents(dst) == expected


def test_parts_beside_one_another_that_are_killed_and_started_again_are_byte_for_byte_one_pack(tmp_path):
    source, dst, chance = write_source(tmp_path / "source", 120), tmp_path / "set", random.Random(0)
    small = 0.002  # a shard for every image
    pack_part(source, tmp_path / "whole", 0, 1, small)

    def start(i):
        words = ("pack", "celeba", str(source), str(dst), f"--shard-mb={small}", "--workers=1", f"--part={i}/3")
        return subprocess.Popen([sys.executable, "-m", "shards", *words], stdout=subprocess.DEVNULL)

    parts, deadline = [start(i) for i in range(3)], time.monotonic() + 120
    for recorded in (1, 40, 80):
        while len(list(dst.glob(".*.record"))) < recorded:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        i = chance.choice([i for i in range(3) if parts[i].poll() is None])
        time.sleep(chance.uniform(0, 0.01))
        parts[i].kill()
        parts[i].wait()
        parts[i] = start(i)
    assert [part.wait() for part in parts] == [0, 0, 0]
    assert contents(dst) == contents(tmp_path / "whole")
