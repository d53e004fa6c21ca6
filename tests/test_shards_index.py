import gzip
import os
import subprocess
import sys
import zlib

import foreign_tars as ft
import http_server
import numpy as np
import pytest
from damage import republish
from foreign_tars import END, header, member, pax, picture, write, write_samples
from tiny_set import pack_tiny

from shards import manifest
from shards.__main__ import main
from shards.checking.verify import verify
from shards.foreign.index import index
from shards.manifest import ShardError
from shards.reading.library import Library
from shards.reading.reader import Reader
from shards.remote import fetch


def keys(found, split):
    return [found.key(split, row) for row in range(found.splits[split].count)]


def test_an_indexed_set_trains_like_any_other(tmp_path):
    (tmp_path / "other").mkdir()
    write_samples(tmp_path / "a.tar", range(0, 5))
    write_samples(tmp_path / "other" / "b.tar", range(5, 9), "png")
    write_samples(tmp_path / "v.tar", range(9, 12), "npy")
    found = index(
        [str(tmp_path / "a.tar"), str(tmp_path / "other" / "b.tar")],
        tmp_path,
        valid=[str(tmp_path / "v.tar")],
        quiet=True,
    )
    assert [shard.url for shard in found.splits["train"].shards] == [None, str(tmp_path / "other" / "b.tar")]
    assert (found.encoding, found.size_text, found.channels) == ("jpg, npy, png", "31 x 37", 3)
    assert keys(found, "train") + keys(found, "valid") == [f"{number:04d}" for number in range(12)]
    assert found.attributes == ("class_0", "class_1", "class_2")
    labels = np.concatenate([found.array(split, "labels") for split in ("train", "valid")])
    assert labels.argmax(axis=1).tolist() == [number % 3 for number in range(12)]
    assert (labels.sum(axis=1) == 1).all()

    kinds = ["jpg"] * 5 + ["png"] * 4 + ["npy"] * 3
    expected = [
        ft.image.scale([ft.image.centre(ft.image.decode(picture(number, kind), 3), None)], 16)[0]
        for number, kind in enumerate(kinds)
    ]
    library = Library(str(tmp_path), tmp_path / "cache")
    readers = [Reader(library, split, size=16, crop=None, threads=2) for split in ("train", "valid")]
    got = [reader.read(np.arange(reader.count)) for reader in readers]
    assert np.array_equal(np.concatenate(got), expected)
    assert verify(tmp_path, deep=True, stock=True, quiet=True) == []


def test_without_validation_tars_one_of_twenty_samples_is_held_out(tmp_path, capsys):
    write_samples(tmp_path / "a.tar", range(25))
    write_samples(tmp_path / "b.tar", range(25, 50))
    assert main(["index", str(tmp_path / "{a,b}.tar"), "--to", str(tmp_path / "set")]) == 0
    assert "labels of 3 classes from .cls; no --valid: 2 of 50 samples are for validation" in capsys.readouterr().out
    found = manifest.read(tmp_path / "set")
    held = keys(found, "valid")
    assert held == sorted(held)
    assert len(held) == 2
    assert keys(found, "train") == [f"{number:04d}" for number in range(50) if f"{number:04d}" not in held]
    assert sum(shard.count for shard in found.splits["train"].shards) == 48
    assert verify(found.directory, deep=True, stock=True, quiet=True) == []


def test_a_set_of_our_own_is_indexed_with_all_that_its_json_says(tmp_path):
    packed = pack_tiny(tmp_path / "packed")
    tars = {split: [str(packed.shard_path(split, i)) for i in range(len(packed.splits[split].shards))]
            for split in ("train", "valid")}  # fmt: skip
    found = index(tars["train"], tmp_path / "set", valid=tars["valid"], quiet=True)
    assert found.attributes == packed.attributes
    for split in tars:
        for name in ("index", "labels"):
            assert np.array_equal(found.array(split, name), packed.array(split, name))
    assert verify(tmp_path / "set", deep=True, stock=True, quiet=True) == []


@pytest.mark.parametrize("form", ft.FORMATS)
def test_members_are_grouped_and_named_as_webdataset_does(tmp_path, form):
    long = "d" * 60 + "/" + "e" * (30 if form == "ustar" else 90)
    members = [
        ("./one.JPG", picture(1)),
        ("./one.seg.png", picture(1, "png")),
        ("./one.txt", b"text"),
        ("__meta__", b"{}"),
        ("__meta__/a.json", b"{}"),
        ("README", b"no key"),
        (f"{long}/zwei ü.jpeg", picture(2, "jpeg")),
        ("a.b/three.webp", picture(3, "webp")),
    ]
    path = write(tmp_path / "a.tar", members if form != "ustar" else [m for m in members if "ü" not in m[0]], form)
    found = index([str(path)], tmp_path, quiet=True)
    expected = {"./one", f"{long}/zwei ü", "a.b/three"} if form != "ustar" else {"./one", "a.b/three"}
    assert {*keys(found, "train"), *keys(found, "valid")} == expected
    assert verify(tmp_path, deep=True, stock=True, quiet=True) == []


def test_directories_are_passed_over_and_old_headers_read(tmp_path):
    old = bytearray(header(b"old.jpg", len(picture(1)), kind=b"\0"))
    old[257:] = bytes(255)
    old[148:156] = b" " * 8
    old[148:156] = b"%06o\0 " % sum(old)
    body = picture(1) + bytes(-len(picture(1)) % 512)
    data = header(b"d/", kind=b"5") + header(b"v7/", kind=b"\0") + bytes(old) + body + member(b"d/new.jpg", picture(2))
    (tmp_path / "a.tar").write_bytes(data + END)
    found = index([str(tmp_path / "a.tar")], tmp_path, quiet=True)
    assert {*keys(found, "train"), *keys(found, "valid")} == {"old", "d/new"}


def refused(tmp_path, data, **options):
    """The line with which a tar of these bytes is refused; nothing is written."""
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(ShardError) as caught:
        index([str(path)], tmp_path / "set", quiet=True, **options)
    assert not (tmp_path / "set").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar"]
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{path}: byte ")
    return line.removeprefix(f"{path}: ")


GOOD = member(b"one.jpg", picture(1))
HOSTILE = {
    "absolute name": (member(b"/etc/passwd.jpg", b"x"), "'/etc/passwd.jpg' leads out of the folder"),
    "parent": (member(b"a/../../b.jpg", b"x"), "'a/../../b.jpg' leads out of the folder"),
    "parent by pax": (pax({"path": "../b.jpg"}) + member(b"b.jpg", b"x"), "'../b.jpg' leads out of the folder"),
    "parent by GNU": (
        member(b"././@LongLink", b"../b.jpg\0", kind=b"L") + member(b"b.jpg", b"x"),
        "'../b.jpg' leads out of the folder",
    ),
    "hard link": (member(b"b.jpg", kind=b"1", link=b"one.jpg"), "'b.jpg' is a link"),
    "symbolic link": (member(b"b.jpg", kind=b"2", link=b"/etc/passwd"), "'b.jpg' is a symbolic link"),
    "device": (member(b"b.jpg", kind=b"3"), "'b.jpg' is a device"),
    "pipe": (member(b"b.jpg", kind=b"6"), "'b.jpg' is a pipe"),
    "unknown type": (member(b"b.jpg", kind=b"V"), "'b.jpg' is of type b'V'"),
    "sparse": (member(b"b.jpg", kind=b"S"), "'b.jpg' is sparse"),
    "sparse by pax": (pax({"GNU.sparse.major": "1"}) + member(b"b.jpg", b"x"), "a sparse member"),
    "huge": (header(b"b.jpg", 8**11 - 1), "'b.jpg' claims 8589934591 bytes, but the tar ends at byte"),
    "huge base 256": (header(b"b.jpg", b"\x80" + b"\xff" * 11), "'b.jpg' claims 309485009821345068724781055 bytes"),
    "negative": (header(b"b.jpg", b"\xff" * 12), "claims a size of b'\\xff\\xff"),
    "minus": (header(b"b.jpg", b"-0000000777\0"), "claims a size of b'-0000000777\\x00'"),
    "huge by pax": (pax({"size": "9" * 30}) + header(b"b.jpg"), "'b.jpg' claims 99999999999999999999 bytes, but"),
    "minus by pax": (pax({"size": "-5"}) + header(b"b.jpg"), "'b.jpg' claims a size of b'-5'"),
    "pax header of 4 GB": (header(b"x", 2**32, kind=b"x"), "a pax header of 4294967296 bytes after 'one.jpg'"),
    "long name of 1 TB": (
        header(b"x", b"\x80" + b"\0" * 5 + b"\1" + b"\0" * 5, kind=b"L"),
        "a long name header of 10995",
    ),
    "damaged pax": (member(b"x", b"99 path=b.jpg\n", kind=b"x") + member(b"b.jpg", b"x"), "a damaged pax header"),
    "global pax": (pax({"path": "b.jpg"}, kind=b"g"), "a global pax header that names or sizes every member"),
    "control character": (member(b"b\n.jpg", b"x"), "'b\\n.jpg' is no name for an image"),
    "no name": (member(b"", b"x"), "'' is no name for an image"),
    "checksum": (b"c" + GOOD[1:], "a damaged tar header after 'one.jpg'"),
    "key again": (member(b"two.jpg", picture(2)) + member(b"one.cls", b"1"), "'one' comes again after other samples"),
    "member twice": (member(b"one.JPG", picture(1)), "'one.JPG' comes twice in the sample 'one'"),
    "no image": (member(b"two.txt", b"x") + member(b"two.cls", b"1"), "the sample 'two' has no image, only txt, cls"),
    "two images": (
        member(b"one.png", picture(1, "png")),
        "the sample 'one' has several images: jpg, png; choose with --image jpg",
    ),
    "not an image": (member(b"two.jpg", b"text"), "'two.jpg' is not an image"),
    "npy that claims much": (
        member(b"two.npy", picture(2, "npy").replace(b"(37, 31, 3), }", b"(10**9, 3, 3)}")),
        "'two.npy' is a damaged npy file",
    ),
    "npy of terabytes": (
        member(b"two.npy", picture(2, "npy").replace(b"(37, 31, 3), }        ", b"(1000000, 1000000, 3)}")),
        "'two.npy' is an npy array [1000000, 1000000, 3] in a file of",
    ),
    "two tars": (END + GOOD, "something follows the end of the tar after 'one.jpg'"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_has_no_place_in_a_data_set_is_refused_in_one_line(tmp_path, name):
    data, words = HOSTILE[name]
    assert words in refused(tmp_path, GOOD + data + END)


def test_a_png_bomb_is_refused_unopened(tmp_path):
    bomb = bytearray(picture(1, "png"))
    bomb[16:24] = (100_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    assert "'two.png' is" in refused(tmp_path, GOOD + member(b"two.png", bytes(bomb)) + END)


def test_a_truncated_tar_is_refused_wherever_it_ends(tmp_path):
    data = GOOD + member(b"two.jpg", picture(2)) + END
    for at in range(0, len(data) - 512, 301):
        line = refused(tmp_path, data[:at])
        assert "ends" in line
        assert ("one.jpg" in line or "two.jpg" in line) == (at >= 512)
    line = refused(tmp_path, data[: len(data) - len(END)])
    assert line == f"byte {len(data) - len(END)}: truncated: the tar ends without the mark of its end after 'two.jpg'"


@pytest.mark.parametrize("magic", [gzip.compress(GOOD), b"BZh91AY", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])
def test_a_compressed_tar_is_refused_with_the_reason_and_the_cure(tmp_path, magic):
    line = refused(tmp_path, magic.ljust(2048, b"\1"))
    assert line.startswith("byte 0: compressed, so that no image could be read without all before it; unpack it: ")


def test_a_web_page_is_not_a_tar(tmp_path):
    assert "a web page, not a tar" in refused(tmp_path, b"\n<!DOCTYPE html>".ljust(512))


def test_no_single_byte_of_a_header_changes_unseen(tmp_path):
    data = bytearray(GOOD + member(b"two.jpg", picture(2)) + END)
    for at in range(len(GOOD), len(GOOD) + 512, 3):
        data[at] ^= 4
        refused(tmp_path, bytes(data))
        data[at] ^= 4


def test_memory_stays_small_whatever_a_header_claims(tmp_path):
    measured = (
        "import resource, sys; from shards.__main__ import main; status = main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    peaks = []
    for claim, name, words in (
        (len(picture(1)), "good", ""),
        (300 * 2**20, "large", "an image of 314,572,800 bytes; more than 201,330,688 are refused"),
        (2**40, "huge", "claims 1099511627776 bytes, but the tar ends at byte"),
    ):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(header(b"one.jpg", b"\x80" + claim.to_bytes(11, "big")) + picture(1))
        os.truncate(path, path.stat().st_size // 512 * 512 + (2048 if name == "good" else 301 * 2**20))  # zeros
        command = [sys.executable, "-c", measured, "index", str(path), "--to", str(tmp_path / "set")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1  # a single sample is too few
        assert words in done.stderr
        peaks.append(int(done.stdout))
    assert max(peaks) < peaks[0] + 30_000  # kB


def test_the_image_member_can_be_chosen(tmp_path, capsys):
    members = [(f"{i}.{kind}.{end}", picture(i, end)) for i in range(3) for kind in "ab" for end in ("jpg",)]
    path = write(tmp_path / "a.tar", members)
    assert main(["index", str(path), "--to", str(tmp_path)]) == 1
    assert "several images: a.jpg, b.jpg; choose with --image a.jpg" in capsys.readouterr().err
    found = index([str(path)], tmp_path, image=".b.jpg", quiet=True)
    assert found.array("train", "index")["offset"][0] > 512 + len(picture(0))
    assert verify(tmp_path, deep=True, stock=True, quiet=True) == []


def test_what_cannot_be_indexed_at_all_is_said_before_reading(tmp_path):
    path = write_samples(tmp_path / "a.tar", range(2))
    for tars, words in (
        ([str(path), str(path)], "given twice"),
        ([str(tmp_path)], "a folder; give the tars in it"),
        ([str(tmp_path / "b.tar")], "there is no such file"),
        (["pipe:cat a.tar"], "a command cannot be kept"),
    ):
        with pytest.raises(ShardError, match=words):
            index(tars, tmp_path / "set", quiet=True)
    index([str(path)], tmp_path, quiet=True)
    with pytest.raises(ShardError, match=r"describes a set already; remove its manifest.json"):
        index([str(path)], tmp_path, quiet=True)


def test_labels_that_are_not_for_every_sample_are_left_out_aloud(tmp_path, capsys):
    for name, texts, words in (
        ("some", (b"1", b"x"), "no labels: 1 of 2 samples have no number as .cls"),
        ("many", (b"1", b"5000"), "no labels: the greatest .cls is 5,000"),
    ):
        members = [m for i, t in enumerate(texts) for m in ((f"{i}.jpg", picture(i)), (f"{i}.cls", t))]
        assert main(["index", str(write(tmp_path / f"{name}.tar", members)), "--to", str(tmp_path / name)]) == 0
        assert words in capsys.readouterr().out
        assert manifest.read(tmp_path / name).attributes == ()
        assert verify(tmp_path / name, deep=True, quiet=True) == []


def test_tars_behind_urls_are_read_once_more_when_the_line_breaks(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "BACKOFF", 0.01)
    with http_server.serving() as web:
        for name, numbers in (("a", range(4)), ("b", range(4, 6))):
            web.files[f"/{name}/0.tar"] = write_samples(tmp_path / f"{name}.tar", numbers).read_bytes()
        web.faults["/a/0.tar"].extend(["503", "short"])
        found = index([f"{web.url}/{{a,b}}/0.tar"], tmp_path / "set", quiet=True)
        assert [shard.url for shard in found.splits["train"].shards] == [f"{web.url}/{name}/0.tar" for name in "ab"]
        assert [shard.name for shard in found.splits["train"].shards] == ["00000-0.tar", "00001-0.tar"]
        assert web.gets["/a/0.tar"] == 3
        assert verify(tmp_path / "set", deep=True, stock=True, quiet=True) == []

        web.files["/a/0.tar"] = web.files["/a/0.tar"].replace(b"0000.cls", b"0000.txt")
        monkeypatch.setattr(fetch, "TRIES", 2)
        [fault] = verify(tmp_path / "set", quiet=True)
        assert fault.startswith(f"00000-0.tar: {web.url}/a/0.tar: other bytes came")
        web.faults["/b/0.tar"].extend(["404", "404"])
        with pytest.raises(ShardError, match=r"b/0.tar: status 404 .*; gave up after 1 tries; check the address"):
            index([f"{web.url}/b/0.tar"], tmp_path / "other", quiet=True)


def test_deep_compares_what_the_tar_says_with_the_arrays(tmp_path):
    valid = write_samples(tmp_path / "v.tar", range(9, 12))
    found = index([str(write_samples(tmp_path / "a.tar", range(9)))], tmp_path, valid=[str(valid)], quiet=True)
    for name, change, words in (
        ("labels", lambda array: array[:, ::-1], "sample 0009: the tar and labels.npy disagree about attributes"),
        ("keys", lambda array: array[[1, 0, 2]], "sample 0010: the tar has another here, or elsewhere"),
        ("index", lambda array: array[[0, 1, 1]], "sample 0011: the tar has another here, or elsewhere"),
    ):
        array = found.array("valid", name).copy()
        republish(found, "valid", name, change(array))
        faults = verify(tmp_path, deep=True, quiet=True)
        assert f"v.tar: {words}" in faults
        assert all(fault.startswith("v.tar: sample 00") for fault in faults)
        republish(found, "valid", name, array)
    assert verify(tmp_path, deep=True, quiet=True) == []

    write_samples(valid, range(9, 11))
    assert any(
        fault.startswith("v.tar: 2 samples where the index has 3") for fault in verify(tmp_path, deep=True, quiet=True)
    )


def test_braces_that_are_never_closed_are_one_line(tmp_path):
    with pytest.raises(ShardError, match=r"^a-{0..3.tar: Unbalanced braces: .*; braces are as in {000..012}$"):
        index(["a-{0..3.tar"], tmp_path)
