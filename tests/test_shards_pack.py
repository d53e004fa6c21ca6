import gc
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
import webdataset
from tiny_celeba import (
    HEIGHT,
    SHARD_MB,
    WIDTH,
    contents,
    label,
    names,
    photograph,
    whole_source,
    zip_images,
)
from webdataset.writer import TarWriter

from shards import image, manifest, tar
from shards.checking.verify import verify
from shards.manifest import Factor, ShardError
from shards.packing import pack
from shards.packing.plan import Options, cut
from shards.sources import Table, faces, samples


@pytest.fixture
def source(tmp_path):
    return whole_source(tmp_path / "source")


def pack_quietly(source, dst, *, name="celeba", workers=1, quiet=True, allow_missing=False, **options):
    chosen = Options(**{"shard_mb": SHARD_MB, **options})
    return pack.pack_celeba(
        source, dst, name=name, options=chosen, allow_missing=allow_missing, workers=workers, quiet=quiet
    )


def stock(found, split):
    """The samples of a split as webdataset itself reads them."""
    urls = [str(found.shard_path(split, number)) for number in range(len(found.splits[split].shards))]
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # it leaves its files to the collector
        samples = list(webdataset.WebDataset(urls, shardshuffle=False))
        gc.collect()
    return samples


def test_stock_webdataset_reads_every_sample_with_the_original_bytes(source, tmp_path):
    found = pack_quietly(source, tmp_path / "set")
    assert {name: split.count for name, split in found.splits.items()} == {"train": 20, "valid": 2, "test": 2}
    assert len(found.splits["train"].shards) > 2
    samples = [sample for split in found.splits for sample in stock(found, split)]
    assert [sample["__key__"] + ".jpg" for sample in samples] == names(24)
    for number, sample in enumerate(samples, 1):
        assert sample["jpg"] == photograph(number)
        assert sample.keys() - {"__key__", "__url__", "__local_path__"} == {"jpg", "json"}
        told = json.loads(sample["json"])
        assert told["image_id"] == number
        assert told["attributes"] == {
            name: int(label(number, k) > 0) for k, name in enumerate(("Male", "Young", "Smiling"))
        }
        assert told["identity"] == number % 5 + 1
        assert list(told["landmarks"].values()) == [10 * number + k for k in range(10)]
        assert told["bbox"] == {"x_1": number, "y_1": 2 * number, "width": 3000, "height": 4 * number}
        assert told["factors"] == {"hue": number / 10, "turn": -number}


def test_a_shard_is_byte_for_byte_what_webdatasets_writer_writes(source, tmp_path):
    found = pack_quietly(source, tmp_path / "set")
    stream = io.BytesIO()
    with TarWriter(stream, encoder=False, mtime=0, user=tar.OWNER, group=tar.OWNER, mode=0o444) as stock_writer:
        for sample in stock(found, "valid"):
            stock_writer.write({key: sample[key] for key in ("__key__", "jpg", "json")})
    assert found.shard_path("valid", 0).read_bytes() == stream.getvalue()


def test_index_arrays_and_manifest_describe_the_files(source, tmp_path):
    found = pack_quietly(source, tmp_path / "set")
    assert found == manifest.read(tmp_path / "set")
    assert found.digest == hashlib.sha256((tmp_path / "set" / "manifest.json").read_bytes()).hexdigest()
    assert (found.name, found.encoding, found.height, found.width) == ("celeba", "jpg", HEIGHT, WIDTH)
    assert (found.channels, found.smallest, found.scaled, found.crop) == (3, WIDTH, False, None)
    assert (found.attributes, found.factors) == (
        ("Male", "Young", "Smiling"),
        (Factor(name="hue"), Factor(name="turn")),
    )
    listed = {"manifest.json"}
    first = 1
    for name, split in found.splits.items():
        for file in (*split.shards, *split.arrays.values()):
            data = (tmp_path / "set" / file.name).read_bytes()
            assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
            listed.add(file.name)
        index = found.array(name, "index")
        assert index.dtype == manifest.INDEX
        assert index["image"].tolist() == list(range(first, first + split.count))
        assert np.bincount(index["shard"]).tolist() == [shard.count for shard in split.shards]
        for row in index:
            with found.shard_path(name, row["shard"]).open("rb") as stream:
                stream.seek(row["offset"])
                data = stream.read(row["length"])
            assert data == photograph(row["image"])
            assert zlib.crc32(data) == row["crc32"]
        arrays = {key: found.array(name, key) for key in split.arrays}
        assert {key: (array.dtype, array.shape) for key, array in arrays.items() if key != "index"} == {
            "labels": (np.uint8, (split.count, 3)),
            "identity": (np.int32, (split.count,)),
            "landmarks": (np.int16, (split.count, 10)),
            "bbox": (np.int32, (split.count, 4)),
            "factors": (np.float32, (split.count, 2)),
        }
        assert arrays["bbox"][:, 0].tolist() == index["image"].tolist()
        assert np.array_equal(arrays["factors"], np.array([[i / 10, -i.item()] for i in index["image"]], np.float32))
        first += split.count
    assert listed == set(contents(tmp_path / "set"))


def test_the_same_source_gives_the_same_bytes_from_zip_or_folder_with_any_number_of_workers(source, tmp_path):
    pack_quietly(source, tmp_path / "one")
    pack_quietly(source, tmp_path / "three", workers=3)
    zip_images(source)
    pack_quietly(source, tmp_path / "zip")
    assert contents(tmp_path / "one") == contents(tmp_path / "three") == contents(tmp_path / "zip")


def test_a_split_without_images_is_left_out(source, tmp_path):
    path = source / "list_eval_partition.txt"
    path.write_text("".join(f"{name} 0\n" for name in names(24)))
    found = pack_quietly(source, tmp_path / "set")
    assert found.splits.keys() == {"train"}
    with pytest.raises(ShardError, match="no split 'valid'; this set has train"):
        found.array("valid", "index")


def test_the_plan_cuts_consecutive_shards_of_nearly_equal_size():
    sizes = np.random.default_rng(0).integers(4_000, 22_000, 5_000)
    parts = cut(sizes, 10**6)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == len(sizes)
    weights = [sizes[part].sum() for part in parts]
    assert min(weights) > 0.9 * max(weights)
    assert 0.9e6 < max(weights) < 1.02e6
    assert cut(np.array([5, 5]), 1) == [slice(0, 1), slice(1, 2)]
    assert cut(np.array([5, 5]), 10**6) == [slice(0, 2)]
    assert cut(np.array([10**7, 5, 10**7]), 10**6) == [slice(0, 1), slice(1, 3)]


def test_a_complete_set_is_kept_if_it_is_the_same_and_defended_if_not(source, tmp_path, capsys):
    found = pack_quietly(source, tmp_path / "set")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    assert pack_quietly(source, tmp_path / "set", workers=2, quiet=False) == found
    assert f"already packed from this source, manifest {found.digest}" in capsys.readouterr().out

    def refused(reason, **options):
        with pytest.raises(ShardError, match=rf"set: holds another data set \({reason}\)"):
            pack_quietly(source, tmp_path / "set", **options)

    refused("it has shards of another size", shard_mb=1)
    refused("its images are in another order", shuffle=0)
    refused("its images are jpg, 18 x 22", npy=16)
    refused("its name is 'celeba'", name="other")
    image = source / "img_align_celeba" / "000003.jpg"
    image.write_bytes(photograph(99))
    refused("it was packed from other images")
    image.write_bytes(photograph(3))
    (source / "factors.csv").unlink()
    refused("it was packed with another factors.csv")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}


def test_a_complete_set_that_lost_a_shard_is_not_called_packed(source, tmp_path):
    found = pack_quietly(source, tmp_path / "set")
    found.shard_path("train", 1).unlink()
    with pytest.raises(
        ShardError, match=r"train-00001.tar: missing; mend it with `python -m shards verify DST --repair`"
    ):
        pack_quietly(source, tmp_path / "set")


def test_a_directory_with_something_else_in_it_is_refused_untouched(source, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train-00000.tar").write_text("mine")
    with pytest.raises(ShardError, match="not empty, and not a packed data set"):
        pack_quietly(source, tmp_path / "set")
    assert contents(tmp_path / "set") == {"train-00000.tar": b"mine"}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (photograph(5)[:-300], "000005.jpg is a truncated JPEG"),
        (photograph(5)[:-2], "000005.jpg is a truncated JPEG"),
        (photograph(5) + b"\0\0", None),  # padding after the end is harmless
        (b"", "000005.jpg is an empty file"),
        (b"GIF89a" + bytes(100), r"000005.jpg is not an image \(jpg, png, webp or npy\)"),
        (photograph(5)[:20] + photograph(5)[-2:], "000005.jpg is a damaged JPEG"),
    ],
)
def test_an_image_that_cannot_be_used_is_named(source, tmp_path, data, words):
    path = source / "img_align_celeba" / "000005.jpg"
    path.write_bytes(data)
    if words is None:
        found = pack_quietly(source, tmp_path / "set")
        assert stock(found, "train")[4]["jpg"] == data
    else:
        with pytest.raises(ShardError, match=words) as caught:
            pack_quietly(source, tmp_path / "set")
        assert "\n" not in str(caught.value)
        assert "manifest.json" not in contents(tmp_path / "set")
        path.write_bytes(photograph(5))
        pack_quietly(source, tmp_path / "set")


def test_of_two_bad_images_in_two_shards_the_first_is_named_by_any_number_of_workers(source, tmp_path):
    for number in (3, 19):
        (source / "img_align_celeba" / f"{number:06d}.jpg").write_bytes(photograph(number)[:-number])
    for workers in (1, 2):
        with pytest.raises(ShardError, match=r"000003\.jpg is a truncated JPEG"):
            pack_quietly(source, tmp_path / f"set{workers}", workers=workers)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def feed(fifo, data):
    """Whether somebody waited for the data, who then has it."""
    try:
        handle = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return False
    os.write(handle, data)
    os.close(handle)
    return True


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stream:  # noqa: PTH123
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


STUCK = """
import sys, time
from pathlib import Path
from shards import image
from shards.__main__ import main

dimensions, forbidden = image.dimensions, Path(__file__).with_name("forbidden").read_bytes()

def stuck(data):
    while data == forbidden:
        time.sleep(60)
    return dimensions(data)

image.dimensions = stuck  # in every worker too: each imports this file
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_pack_leaves_no_manifest_and_no_process_and_packing_again_goes_on(source, tmp_path, workers):
    dst, script = tmp_path / "set", tmp_path / "stuck.py"
    expected = contents(pack_quietly(source, tmp_path / "clean").directory)
    script.write_text(STUCK)
    script.with_name("forbidden").write_bytes(photograph(15))
    command = [sys.executable, script, "pack", "celeba", source, dst, f"--shard-mb={SHARD_MB}", f"--workers={workers}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_until(lambda: len(list(dst.glob(".*.part"))) == 1 and len(list(dst.glob(".train-*.record"))) >= 3)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as stream:  # noqa: PTH123
        children = stream.read().split()
    assert len(children) >= (workers if workers > 1 else 0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(running(child) for child in children))
    left = contents(dst)
    assert "manifest.json" not in left
    for path in dst.glob("*.tar"):
        assert left[path.name] == expected[path.name]
    with pytest.raises(ShardError, match=r"incomplete \(no manifest.json\)"):
        manifest.read(dst)

    with pytest.raises(ShardError, match=r"another pack was begun here \(--shard-mb was 0.012, now it is 1\)"):
        pack_quietly(source, dst, shard_mb=1)
    assert {name: data for name, data in contents(dst).items() if ".part" not in name} == {
        name: data for name, data in left.items() if ".part" not in name
    }
    recorded = [path for path in dst.glob("*.tar") if path.with_name(f".{path.name}.record").exists()]
    before = {path: path.stat().st_mtime_ns for path in recorded}
    pack_quietly(source, dst)
    assert contents(dst) == expected
    assert len(before) >= 3
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_of_what_an_interrupted_pack_left_only_whole_shards_of_the_same_images_stay(source, tmp_path):
    dst, broken = tmp_path / "set", source / "img_align_celeba" / "000020.jpg"
    expected = contents(pack_quietly(source, tmp_path / "clean").directory)
    broken.write_bytes(b"\xff" * len(photograph(20)))
    with pytest.raises(ShardError, match=r"000020.jpg is not an image"):
        pack_quietly(source, dst)
    broken.write_bytes(photograph(20))
    (source / "img_align_celeba" / "000001.jpg").write_bytes(photograph(99))
    (dst / "train-00001.tar").write_bytes(b"half")
    (dst / ".train-00002.tar.record").write_bytes(b"{")
    (dst / ".train-00003.tar.1234.part").write_bytes(b"half")
    (dst / "train-00099.tar").write_bytes(b"of a time when there were more images")
    (dst / "test.index.npy").write_bytes(b"of a time when there was a test")
    kept = (dst / "train-00003.tar").stat().st_mtime_ns
    edited = contents(pack_quietly(source, dst).directory)
    assert (dst / "train-00003.tar").stat().st_mtime_ns == kept
    assert edited.keys() == expected.keys()
    assert {name for name in edited if edited[name] != expected[name]} >= {"train-00000.tar", "manifest.json"}
    assert edited == contents(pack_quietly(source, tmp_path / "clean of the same").directory)


def test_a_pack_killed_as_it_began_or_as_it_ended_is_taken_up_again(source, tmp_path):
    dst = tmp_path / "set"
    dst.mkdir()
    (dst / "..unfinished.77.part").touch()
    found = pack_quietly(source, dst)
    expected = contents(dst)
    (dst / ".unfinished").write_text("{}")
    (dst / ".train-00001.tar.record").write_text("{}")
    assert pack_quietly(source, dst) == found
    assert contents(dst) == expected
    (dst / "manifest.json").unlink()
    (dst / ".unfinished").touch()
    with pytest.raises(ShardError, match="another version of this program began a pack here"):
        pack_quietly(source, dst)


def test_an_interrupt_is_one_line_and_publishes_nothing(source, tmp_path):
    dst, image = tmp_path / "set", source / "img_align_celeba" / "000024.jpg"
    image.unlink()
    os.mkfifo(image)
    command = [sys.executable, "-m", "shards", "pack", "celeba", source, dst, f"--shard-mb={SHARD_MB}", "--workers=2"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, process_group=0,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background of a shell ignore it
    )  # fmt: skip
    wait_until(lambda: any(dst.glob("*.tar")))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    # a worker ends the shard it is at
    wait_until(lambda: feed(image, photograph(24)) or process.poll() is not None)
    assert process.communicate()[1] == b"shards: interrupted; the same command goes on from there\n"
    assert process.returncode == 130
    assert not (dst / "manifest.json").exists()


def test_packing_loads_no_torch(source, tmp_path):
    code = f"""
import sys
from shards.packing.pack import pack_celeba
pack_celeba({str(source)!r}, {str(tmp_path / "set")!r}, workers=1)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_faces_are_drawn_once_and_after_an_interrupt_only_those_that_lack(tmp_path, monkeypatch):
    drawn = []

    def draw(factors):
        if len(drawn) == 6:
            raise KeyboardInterrupt
        drawn.append(factors)
        return np.full((22, 18, 3), len(drawn), np.uint8)

    def pack_drawings(dst, seed=3):
        return pack.pack_faces(dst, count=10, seed=seed, options=Options(shard_mb=0.02), workers=1, quiet=True)

    monkeypatch.setattr(faces, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        pack_drawings(tmp_path / "set")
    monkeypatch.setattr(faces, "draw", lambda factors: drawn.append(factors) or np.zeros((22, 18, 3), np.uint8))
    with pytest.raises(ShardError, match="another pack was begun here"):
        pack_drawings(tmp_path / "set", seed=4)
    found = pack_drawings(tmp_path / "set")
    assert 10 <= len(drawn) < 6 + 10
    assert {name: split.count for name, split in found.splits.items()} == {"train": 8, "valid": 1, "test": 1}
    assert [factor.name for factor in found.factors] == [factor.name for factor in faces.FACTORS]
    assert {factor.name: factor.values for factor in found.factors}["glasses"] == (0, 1, 2, 3)
    assert found.source.items() >= {"generator": "faces", "count": "10", "seed": "3"}.items()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    drawn.clear()
    assert pack_drawings(tmp_path / "set") == found
    with pytest.raises(ShardError, match="it was packed with another seed"):
        pack_drawings(tmp_path / "set", seed=4)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ShardError, match="not empty"):
        pack_drawings(tmp_path / "other")
    assert drawn == []


def test_images_of_different_sizes_and_kinds_are_one_set(source, tmp_path):
    images = source / "img_align_celeba"
    (images / "000003.jpg").write_bytes(photograph(3, 40, 30))
    (images / "000004.jpg").write_bytes(image.to_png(np.zeros((50, 12, 1), np.uint8)))
    found = pack_quietly(source, tmp_path / "set")
    assert (found.height, found.width, found.smallest, found.channels) == (None, None, 12, 3)
    assert found.encoding == "jpg, png"
    assert stock(found, "train")[3]["png"] == (images / "000004.jpg").read_bytes()
    assert verify(found.directory, deep=True, quiet=True) == []


def test_decoded_squares_are_stored_as_arrays(source, tmp_path):
    found = pack_quietly(source, tmp_path / "set", npy=8, crop=16)
    assert (found.encoding, found.height, found.width, found.scaled, found.crop) == ("npy", 8, 8, True, 16)
    for number, sample in enumerate(stock(found, "train"), 1):
        pixels = image.decode(photograph(number), 3)
        assert np.array_equal(
            np.load(io.BytesIO(sample["npy"])), image.scale([image.centre(pixels, 16)], 8)[0].transpose(1, 2, 0)
        )
    assert verify(found.directory, deep=True, quiet=True) == []
    assert pack_quietly(source, tmp_path / "set", npy=8, crop=16) == found
    with pytest.raises(ShardError, match=r"its images are npy, 8 x 8, crop 16\)"):
        pack_quietly(source, tmp_path / "set", npy=8)
    with pytest.raises(ShardError, match=r"000001.jpg is 18 x 22, too small for --crop 20"):
        pack_quietly(source, tmp_path / "other", npy=8, crop=20)


def test_a_shuffled_set_holds_the_same_samples_in_the_order_of_its_seed(source, tmp_path):
    def order(found):
        return found.array("train", "index")["image"].tolist()

    plain, one, other = (pack_quietly(source, tmp_path / str(seed), shuffle=seed) for seed in (None, 1, 2))
    assert sorted(order(one)) == sorted(order(other)) == order(plain)
    assert order(one) != order(other) != order(plain)
    assert verify(one.directory, deep=True, quiet=True) == []
    assert contents(pack_quietly(source, tmp_path / "again", shuffle=1).directory) == contents(one.directory)


def test_what_the_annotations_name_and_the_folder_lacks_may_be_left_out(source, tmp_path):
    for number in (2, 3, 23):
        (source / "img_align_celeba" / f"{number:06d}.jpg").unlink()
    with pytest.raises(
        ShardError, match=r"3 of 24 images are missing: 000002.jpg, 000003.jpg, 000023.jpg; get them, or"
    ):
        pack_quietly(source, tmp_path / "set")
    found = pack_quietly(source, tmp_path / "set", allow_missing=True)
    assert found.array("train", "index")["image"].tolist() == [1, *range(4, 21)]
    assert found.array("test", "labels").tolist() == [[label(24, k) > 0 for k in range(3)]]
    assert verify(found.directory, deep=True, quiet=True) == []


def test_the_json_of_a_sample_is_what_json_itself_would_write():
    tables = {
        "attributes": Table(columns=("100% %s", 'a "b"', "é"), values=np.array([[0, 1, 1], [1, 0, 1]], np.uint8)),
        "identity": Table(columns=(), values=np.array([3, -4], np.int32)),
        "factors": Table(columns=("x", "y"), values=np.array([[0.1, -1e-30], [2, 1 / 3]], np.float32)),
        "file": Table(columns=(), values=np.array(["a/ü.jpg", 'q"\\.png'], object)),
    }
    plain = [[0.1, -1e-30], [2.0, 0.33333334]]
    for i, text in enumerate(samples(np.array([7, 8]), tables)):
        told = {"image_id": 7 + i}
        for entry, table in tables.items():
            row = plain[i] if entry == "factors" else table.values.tolist()[i]
            told[entry] = dict(zip(table.columns, row, strict=True)) if table.columns else row
        assert text == json.dumps(told, separators=(",", ":")).encode()
