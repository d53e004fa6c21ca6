import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_celeba import HEIGHT, WIDTH, add_options, photograph, write_source

from shards import manifest
from shards.__main__ import main
from shards.checking import inspect
from shards.checking.verify import verify


@pytest.fixture
def source(tmp_path):
    source = write_source(tmp_path / "source")
    add_options(source)
    return source


@pytest.fixture
def shards(capsys):
    """Runs a command line here; returns (exit status, lines of stdout, lines of stderr)."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return run


def test_pack_verify_and_inspect_succeed_on_a_sound_source(source, tmp_path, shards, monkeypatch):
    dst = tmp_path / "set"
    status, out, err = shards("pack", "celeba", source, dst, "--workers", 1)
    digest = manifest.read(dst).digest
    assert (status, err) == (0, [])
    assert out[-2].startswith("packed 12 images, ")
    assert out[-1] == f"{dst}: complete, train 8, valid 2, test 2; manifest {digest}"
    assert shards("verify", dst) == (0, [f"{dst}: 12 images are sound, manifest {digest}"], [])
    assert shards("verify", dst, "--deep") == (0, [f"{dst}: 12 images are sound and decode, manifest {digest}"], [])
    assert shards("pack", "celeba", source, dst) == (
        0,
        [f"{dst}: already packed from this source, manifest {digest}"],
        [],
    )

    monkeypatch.chdir(tmp_path)
    status, out, err = shards("inspect", dst)
    assert (status, err) == (0, [])
    table = {line.split()[0]: line.split()[1:] for line in out if line}
    assert table["train"][:2] == ["8", "1"]
    assert table["Male"] == ["0.500", "0.500", "0.500"]
    assert table["hue"] == ["0.100", "0.650", "1.200", "continuous"]
    assert table["turn"] == ["-12.000", "-6.500", "-1.000", "continuous"]
    assert any("in-the-wild" in line for line in out)
    assert out[-1] == "set-grid.png: train, valid, test from top to bottom"
    with Image.open(tmp_path / "set-grid.png") as image:
        assert image.size == (inspect.COLUMNS * WIDTH, 3 * HEIGHT)
    assert {path.name for path in dst.iterdir()} == {"manifest.json"} | {
        file.name for split in manifest.read(dst).splits.values() for file in (*split.shards, *split.arrays.values())
    }
    assert shards("inspect", dst, "--grid", tmp_path / "other.png")[0] == 0
    assert (tmp_path / "other.png").read_bytes() == (tmp_path / "set-grid.png").read_bytes()


def test_the_grid_shows_the_images_where_it_says(source, tmp_path, shards):
    shards("pack", "celeba", source, tmp_path / "set", "--workers", 1)
    sheet = np.asarray(inspect.grid(manifest.read(tmp_path / "set")))

    def tile(row, column):
        return sheet[row * HEIGHT : (row + 1) * HEIGHT, column * WIDTH : (column + 1) * WIDTH]

    for row, column, image in ((0, 0, 1), (0, 7, 8), (1, 1, 10), (2, 0, 11)):
        (source / "one.jpg").write_bytes(photograph(image))
        with Image.open(source / "one.jpg") as expected:
            assert np.array_equal(tile(row, column), np.asarray(expected))
    assert (tile(0, 8) == 255).all()


def test_every_error_is_one_line_and_a_status_of_1(source, tmp_path, shards):
    dst = tmp_path / "set"

    def fails(words, *arguments):
        status, _, err = shards(*arguments)
        assert status == 1
        assert len(err) == 1
        assert err[0].startswith("shards: ")
        assert words in err[0]

    fails("nowhere: no such folder", "pack", "celeba", tmp_path / "nowhere", dst)
    fails("there is no such data set; make it with", "verify", dst)
    fails("there is no such data set; make it with", "inspect", dst)
    fails("--shard-mb must be positive", "pack", "celeba", source, dst, "--shard-mb", 0)
    (tmp_path / "file").touch()
    fails(f"{tmp_path / 'file'}: ", "pack", "celeba", source, tmp_path / "file", "--workers", 1)
    fails("Not a directory", "pack", "celeba", source, tmp_path / "file" / "set", "--workers", 1)
    assert not dst.exists()

    shards("pack", "celeba", source, dst, "--workers", 1)
    path = dst / "valid-00000.tar"
    path.write_bytes(path.read_bytes().replace(photograph(9), photograph(9)[::-1]))
    fails(
        "sample 000009 is not an image (jpg, png, webp or npy); see `python -m shards verify",
        "inspect",
        dst,
        "--grid",
        tmp_path / "x.png",
    )
    status, out, err = shards("verify", dst)
    assert (status, out) == (1, ["valid-00000.tar: its sha256 is not the one in the manifest"])
    assert err == [f"shards: {dst}: 1 fault found; mend it with `python -m shards verify DST --repair`"]
    assert not (tmp_path / "x.png").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(source, tmp_path, shards):
    dst = tmp_path / "set"
    status, out, err = shards("pack", "celeba", source, dst, "--dry-run", "--shard-mb", 0.006)
    assert (status, err) == (0, [])
    assert not dst.exists()
    table = {line.split()[0]: line.split()[1:] for line in out if line}
    assert out[0] == f"celeba: 12 images of {source / 'img_align_celeba'}"
    assert [table[split][1] for split in ("train", "valid", "test", "all")] == ["8", "2", "2", "12"]
    shards("pack", "celeba", source, dst, "--shard-mb", 0.006, "--workers", 1)
    found = manifest.read(dst)
    counts = [shard.count for shard in found.splits["train"].shards]
    assert table["train"][0] == str(len(counts))
    assert [int(table[f"train-{number:05d}.tar"][2]) for number in range(3)] == counts[:3]
    assert table["train-00000.tar"][:2] == ["1", str(counts[0])]
    assert f"and {len(counts) - 3} more, to train-{len(counts) - 1:05d}.tar" in out
    size = sum(shard.bytes for split in found.splits.values() for shard in split.shards)
    assert float(table["all"][2]) == pytest.approx(size / 1e6, abs=0.01 * len(counts) + 0.1)
    assert max(map(len, out[1:])) <= 80


def test_the_command_line_knows_every_option_of_a_pack(source, tmp_path, shards):
    (source / "img_align_celeba" / "000002.jpg").unlink()
    arguments = ("--workers", 1, "--allow-missing", "--shuffle", 5, "--encoding", "npy", "--size", 8, "--crop", 16)
    assert shards("pack", "celeba", source, tmp_path / "set", *arguments)[0] == 0
    found = manifest.read(tmp_path / "set")
    assert (found.encoding, found.height, found.width, found.crop) == ("npy", 8, 8, 16)
    images = found.array("train", "index")["image"].tolist()
    assert sorted(images) == [1, 3, 4, 5, 6, 7, 8] != images


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--encoding", "npy"), "--encoding npy needs --size"),
        (("--size", "64"), "--size scales images packed with --encoding npy; original bytes are kept whole"),
        (("--crop", "64"), "--crop cuts images packed with --encoding npy; original bytes are kept whole"),
        (("--encoding", "npy", "--size", "0"), "--size 0 is impossible; it is a number of pixels"),
        (("--encoding", "npy", "--size", "8", "--crop", "-1"), "--crop -1 is impossible; it is a number of pixels"),
        (("--shard-mb", "nan"), "a shard of nan MB is impossible; --shard-mb must be positive"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(source, tmp_path, shards, options, words):
    status, out, err = shards("pack", "celeba", source, tmp_path / "set", *options)
    assert (status, out, len(err)) == (1, [], 1)
    assert words in err[0]
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    "arguments",
    [[], ["pack"], ["pack", "celeba"], ["pack", "celeba", "a", "b", "--workers", "0"], ["pack", "faces", "a"]],
)
def test_a_wrong_command_line_is_refused_with_its_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m shards" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["inspect {}", "verify {}", "pack faces {} --count 3", "index a.tar --to {}"])
def test_a_url_is_no_directory_to_write_into(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(words.format("s3://bucket/set").split())
    assert "s3://bucket/set is a URL; name a directory of this machine" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_line_that_names_the_file(source, tmp_path):
    command = f'exec "{sys.executable}" -m shards pack celeba "{source}" "{tmp_path}/set" --workers 1'
    result = subprocess.run(["bash", "-c", f"ulimit -f 4; {command}"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == f"shards: {tmp_path}/set/train-00000.tar: File too large\n"
    assert [path.name for path in (tmp_path / "set").iterdir()] == [".unfinished"]
    subprocess.run(["bash", "-c", command], capture_output=True, check=True)
    assert verify(tmp_path / "set", deep=True, quiet=True) == []
