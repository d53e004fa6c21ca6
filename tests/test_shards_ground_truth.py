"""dSprites and 3D Shapes, drawn or from the official files: the same tars, with their factors."""

import io
import subprocess
import sys

import h5py
import numpy as np
import pytest
from PIL import Image

from shards import image
from shards.__main__ import main
from shards.checking.verify import verify
from shards.manifest import ShardError, read
from shards.packing import pack
from shards.packing.plan import Options, plan
from shards.sources import dsprites, ground_truth, official, shapes3d

COUNT = 40


def write_npz(path, **changes):
    rows = np.arange(COUNT)
    arrays = {
        "metadata": np.array({"a pickle": object}, object),
        "imgs": dsprites.images(rows),
        "latents_classes": np.stack(np.unravel_index(rows, dsprites.SIZES), axis=1),
        "latents_values": dsprites.factors(rows).astype(np.float64),
    } | changes
    with path.open("wb") as stream:
        np.savez_compressed(stream, **{key: array for key, array in arrays.items() if array is not None})
    return path


def write_h5(path, **changes):
    rows = np.arange(COUNT)
    arrays = {"images": shapes3d.images(rows), "labels": shapes3d.factors(rows).astype(np.float64)} | changes
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            if array is not None:
                file.create_dataset(key, data=array, compression="gzip")
    return path


WRITE = {"dsprites": write_npz, "shapes3d": write_h5}
PAINTERS = {"dsprites": dsprites, "shapes3d": shapes3d}


def packed(name, dst, *, file=None, **options):
    source = ground_truth.source(name, file=file, count=COUNT)
    return pack.pack(plan(name, source, Options(**{"shard_mb": 0.05, **options})), dst, workers=1, quiet=True)


def tars(found):
    return {path.name: path.read_bytes() for path in found.directory.glob("*.*") if path.suffix in (".tar", ".npy")}


@pytest.mark.parametrize("name", PAINTERS)
@pytest.mark.parametrize("options", [{}, {"shuffle": 3}])
def test_the_drawn_set_and_the_official_file_give_the_same_shards(name, options, tmp_path):
    drawn = packed(name, tmp_path / "drawn", **options)
    stored = packed(name, tmp_path / "stored", file=WRITE[name](tmp_path / "official"), **options)
    assert tars(drawn) == tars(stored)
    assert len(drawn.splits["train"].shards) > 1
    assert drawn.digest != stored.digest
    assert verify(drawn.directory, deep=True, quiet=True) == []
    assert packed(name, tmp_path / "drawn", **options) == drawn
    assert packed(name, tmp_path / "stored", file=tmp_path / "official", **options) == stored


@pytest.mark.parametrize("name", PAINTERS)
def test_images_and_factors_lie_in_the_official_order(name, tmp_path):
    painter, rows = PAINTERS[name], np.arange(COUNT)
    found = packed(name, tmp_path / "set")
    assert (found.name, found.encoding, found.height, found.width) == (name, "png", 64, 64)
    assert (found.channels, found.attributes) == (1 if name == "dsprites" else 3, ())
    assert {factor.name: factor.values for factor in found.factors} == {
        factor: tuple(float(np.float32(value)) for value in values) for factor, values in painter.FACTORS.items()
    }
    assert found.splits.keys() == {"train"}
    index = found.array("train", "index")
    assert index["image"].tolist() == (rows + 1).tolist()
    assert np.array_equal(found.array("train", "factors"), painter.factors(rows))
    expected = painter.images(rows) * (255 if name == "dsprites" else 1)
    for row, pixels in zip(index, expected.reshape(COUNT, 64, 64, -1), strict=True):
        with found.shard_path("train", row["shard"]).open("rb") as stream:
            stream.seek(row["offset"])
            data = stream.read(row["length"])
        assert np.array_equal(image.decode(data, found.channels), pixels)
        assert len(data) < (200 if name == "dsprites" else 5000)


@pytest.mark.parametrize("shape", [(5, 7), (64, 64), (3, 4, 1), (6, 5, 3)])
def test_pillow_reads_the_png_files_that_are_written_here(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels = pixels > 127 if len(shape) == 2 else pixels
    data = image.to_png(pixels)
    with Image.open(io.BytesIO(data)) as read:
        read.load()
        assert (read.width, read.height) == (shape[1], shape[0])
        assert read.mode == ("1" if len(shape) == 2 else "L" if shape[2] == 1 else "RGB")
        assert np.array_equal(np.asarray(read).reshape(shape), pixels)
    assert image.dimensions(data) == (*shape[:2], 3 if shape[2:] == (3,) else 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latents_values": None}, "not the official file, or damaged .*latents_values"),
        ({"latents_values": np.zeros((COUNT, 6))}, "factors are not those of the 40 images of dsprites in"),
        ({"latents_values": np.zeros((5, 6))}, "its factors are not those of the 40 images"),
        ({"imgs": np.full((COUNT, 64, 64), 255, np.uint8)}, "a pixel is neither 0 nor 1"),
        ({"imgs": np.zeros((COUNT, 32, 32), np.uint8)}, r"its images are uint8 \[40, 32, 32\]"),
        ({"imgs": np.zeros((5, 64, 64), np.uint8)}, r"its images are uint8 \[5, 64, 64\]"),
    ],
)  # fmt: skip
def test_an_npz_that_is_not_the_official_one_is_refused_in_one_line(changes, words, tmp_path):
    refused("dsprites", write_npz(tmp_path / "file.npz", **changes), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": None}, "not the official file, or damaged .*labels"),
        ({"labels": np.zeros((COUNT, 6))}, "its factors are not those of the 40 images of shapes3d in their order"),
        ({"images": np.zeros((COUNT, 32, 32, 3), np.uint8)}, r"its images are uint8 \[40, 32, 32, 3\]"),
        ({"images": np.zeros((5, 64, 64, 3), np.uint8)}, r"its images are uint8 \[5, 64, 64, 3\]"),
    ],
)
def test_an_h5_that_is_not_the_official_one_is_refused_in_one_line(changes, words, tmp_path):
    refused("shapes3d", write_h5(tmp_path / "file.h5", **changes), words)


@pytest.mark.parametrize("name", PAINTERS)
def test_a_damaged_file_is_refused_in_one_line(name, tmp_path):
    path = WRITE[name](tmp_path / "official")
    whole = path.read_bytes()
    for data in (b"", b"<html>", whole[: len(whole) // 2]):
        path.write_bytes(data)
        refused(name, path, "not the official file, or damaged")
    path.unlink()
    refused(name, path, "no such file")


def refused(name, path, words):
    with pytest.raises(ShardError, match=words) as caught:
        ground_truth.source(name, file=path, count=COUNT)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_the_images_of_an_npz_are_read_in_blocks(tmp_path, monkeypatch):
    whole = official.npz_bits(write_npz(tmp_path / "file.npz"), COUNT)
    monkeypatch.setattr(official, "BLOCK", 7)
    assert np.array_equal(official.npz_bits(tmp_path / "file.npz", COUNT), whole)
    path, rows = write_h5(tmp_path / "file.h5"), np.random.default_rng(0).permutation(COUNT)[:30]
    assert np.array_equal(official.h5_images(path, rows), shapes3d.images(rows))


def test_without_h5py_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    path = write_h5(tmp_path / "file.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused("shapes3d", path, "h5py must be there to read it: pip install h5py")


def test_the_command_line_plans_all_images_of_both_sets(tmp_path, capsys):
    for name, count in (("dsprites", "737,280"), ("shapes3d", "480,000")):
        assert main(["pack", name, str(tmp_path / name), "--dry-run"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"{name}: {count} images of ")
        assert not (tmp_path / name).exists()
    assert main(["pack", "dsprites", str(tmp_path / "set"), "--npz", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err == f"shards: {tmp_path / 'nowhere'}: no such file\n"


def test_drawing_dsprites_needs_no_torch(tmp_path):
    code = f"""
import sys
from pathlib import Path
from shards.sources import ground_truth
from shards.packing import pack
from shards.packing.plan import plan
source = ground_truth.source("dsprites", count=20)
pack.pack(plan("dsprites", source, pack.DEFAULT), Path({str(tmp_path / "set")!r}), workers=1, quiet=True)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert read(tmp_path / "set").splits["train"].count == 20
