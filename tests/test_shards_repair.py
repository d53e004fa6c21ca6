import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import http_server
import pytest
from damage import flip
from foreign_tars import picture, write_samples
from tiny_celeba import add_options, photograph, write_source

from shards import manifest
from shards.__main__ import main
from shards.checking.repair import repair
from shards.checking.verify import verify
from shards.foreign.index import index
from shards.manifest import ShardError
from shards.packing import pack
from shards.packing.plan import Options, plan
from shards.sources import folder, ground_truth


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(source, set) of 24 photographs in several shards."""
    source = write_source(tmp_path_factory.mktemp("repair") / "source", 24)
    add_options(source, 24)
    options = Options(shard_mb=0.012, shuffle=5)
    packed = pack.pack_celeba(source, source.with_name("set"), options=options, workers=1, quiet=True)
    return source, packed.directory


@pytest.fixture
def broken(made, tmp_path):
    """(source, set, its bytes when it was sound) with damage of every kind."""
    directory = shutil.copytree(made[1], tmp_path / "set")
    sound = contents(directory)
    flip(directory / "train-00001.tar", 2000)
    (directory / "train-00002.tar").unlink()
    (directory / "valid-00000.tar").write_bytes(b"")
    flip(directory / "train.index.npy", -3)
    (directory / "train.labels.npy").unlink()
    flip(directory / "test.factors.npy", -1)
    return made[0], directory, sound


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@contextmanager
def serving(directory):
    """The URL of a server of these files."""
    with http_server.serving() as web:
        web.files.update({f"/{name}": data for name, data in contents(directory).items()})
        yield web.url


def test_all_that_is_damaged_becomes_what_it_was(broken):
    source, directory, sound = broken
    damaged = repair(directory, str(source), workers=1, quiet=True)
    assert sorted(damaged) == [
        "test.factors.npy",
        "train-00001.tar",
        "train-00002.tar",
        "train.index.npy",
        "train.labels.npy",
        "valid-00000.tar",
    ]
    assert contents(directory) == sound
    assert repair(directory, quiet=True) == {}


def test_arrays_need_nothing_but_the_tars(made, tmp_path):
    directory = shutil.copytree(made[1], tmp_path / "set")
    sound = contents(directory)
    for path in directory.glob("*.npy"):
        path.unlink()
    repair(directory, quiet=True)
    assert contents(directory) == sound


def test_the_command_says_what_it_has_made_again_and_then_checks_all(broken, capsys):
    source, directory, _ = broken
    assert main(["verify", str(directory), "--deep", "--repair", "--from", str(source)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "train-00002.tar: missing: made again" in lines
    assert lines[-1].startswith(f"{directory}: 24 images are sound and decode")
    assert main(["verify", str(directory), "--from", str(source)]) == 1
    assert "--from says what --repair takes the files from" in capsys.readouterr().err


def test_another_source_replaces_nothing(broken, tmp_path):
    source, directory, _ = broken
    before = contents(directory)
    other = shutil.copytree(source, tmp_path / "other")
    for change, words in (
        (lambda: (other / "img_align_celeba" / "000022.jpg").write_bytes(photograph(99)), "valid-00000.tar becomes an"),
        (lambda: (other / "img_align_celeba" / "000022.jpg").unlink(), "1 images of valid-00000.tar are missing, as"),
        (lambda: flip(other / "identity_CelebA.txt", -2), "its identity_CelebA.txt is another"),
    ):
        change()
        with pytest.raises(ShardError) as caught:
            repair(directory, str(other), workers=1, quiet=True)
        assert "not what the set was packed from" in str(caught.value)
        assert words in str(caught.value)
        assert str(caught.value).endswith("; nothing is replaced")
        assert contents(directory) == before
    with pytest.raises(ShardError, match="name what it was packed from, or a copy of it: --from SRC_OR_URL"):
        repair(directory, quiet=True)


@pytest.mark.parametrize("kind", ["folder", "url"])
def test_a_copy_restores_even_the_manifest(made, broken, kind):
    _, directory, sound = broken
    flip(directory / "manifest.json", 100)
    with pytest.raises(ShardError, match=r"manifest.json: damaged.*; it cannot be made again; `--from URL` takes it"):
        repair(directory, quiet=True)
    if kind == "folder":
        repair(directory, str(made[1]), quiet=True)
    else:
        with serving(made[1]) as url:
            repair(directory, url, quiet=True)
    assert contents(directory) == sound


def test_a_copy_with_other_bytes_is_not_taken(made, broken, tmp_path):
    _, directory, _ = broken
    copy = shutil.copytree(made[1], tmp_path / "copy")
    flip(copy / "valid-00000.tar", 0)
    with pytest.raises(ShardError, match=r"valid-00000.tar: not the file that the manifest names; it is not taken"):
        repair(directory, str(copy), quiet=True)
    assert (directory / "valid-00000.tar").read_bytes() == b""


def test_drawn_sets_need_no_source(tmp_path):
    found = pack.pack_faces(tmp_path / "set", count=20, seed=3, options=Options(shard_mb=0.05), workers=1, quiet=True)
    sound = contents(found.directory)
    (found.directory / "train-00001.tar").unlink()
    flip(found.directory / "train.factors.npy", -1)
    flip(found.directory / "test.index.npy", -1)
    repair(found.directory, workers=1, quiet=True)
    assert contents(found.directory) == sound


def test_a_drawn_ground_truth_needs_no_source_either(tmp_path):
    source = ground_truth.source("dsprites", count=300)
    found = pack.pack(plan("dsprites", source, Options(shard_mb=0.2)), tmp_path / "set", workers=1, quiet=True)
    sound = contents(found.directory)
    (found.directory / "train-00001.tar").unlink()
    flip(found.directory / "train.factors.npy", -1)
    repair(found.directory, workers=1, quiet=True)
    assert contents(found.directory) == sound


@pytest.mark.parametrize("labels", ["none", "folders", "table"])
def test_a_set_of_any_folder_is_made_again_from_it(tmp_path, labels):
    source = tmp_path / "source"
    for number in range(12):
        path = source / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, "png"))
    table = tmp_path / "labels.csv"
    rows = "".join(f"{'ab'[number % 2]}/{number}.png,{number % 3 == 0:d}\n" for number in range(12))
    table.write_text(f"file,third\n{rows}")
    read = folder.read(source, labels=table if labels == "table" else None, classes=labels == "folders")
    planned = plan("any", read, Options(shard_mb=0.02, shuffle=1))
    found = pack.pack(planned, tmp_path / "set", workers=1, quiet=True)
    sound = contents(found.directory)
    assert len(found.splits["train"].shards) > 1
    assert verify(found.directory, deep=True, stock=True, quiet=True) == []
    (found.directory / "train-00001.tar").unlink()
    flip(found.directory / "train.index.npy", -1)
    repair(found.directory, str(source), workers=1, quiet=True)
    assert contents(found.directory) == sound
    (found.directory / "train-00001.tar").unlink()
    (source / "a" / "0.png").unlink()
    with pytest.raises(ShardError, match="nothing is replaced"):
        repair(found.directory, str(source), workers=1, quiet=True)


def test_scaled_images_are_scaled_again(made, tmp_path):
    options = Options(npy=8, crop=16)
    found = pack.pack_celeba(made[0], tmp_path / "set", options=options, workers=1, quiet=True)
    sound = contents(found.directory)
    (found.directory / "train-00000.tar").unlink()
    repair(found.directory, str(made[0]), workers=1, quiet=True)
    assert contents(found.directory) == sound


def test_the_arrays_of_indexed_tars_are_made_again_and_the_tars_left_alone(tmp_path):
    (tmp_path / "tars").mkdir()
    path = write_samples(tmp_path / "tars" / "a.tar", range(30))
    here = write_samples(tmp_path / "set.tar", range(30, 40))
    (tmp_path / "set").mkdir()
    here = here.rename(tmp_path / "set" / "b.tar")
    index([str(path), str(here)], tmp_path / "set", quiet=True)
    sound = contents(tmp_path / "set")
    for array in (tmp_path / "set").glob("*.npy"):
        flip(array, -1)
    repair(tmp_path / "set", quiet=True)
    assert contents(tmp_path / "set") == sound

    flip(here, 600)
    with pytest.raises(ShardError, match="its tars come from elsewhere; take them from a copy"):
        repair(tmp_path / "set", quiet=True)
    flip(here, 600)
    flip(path, 600)
    with pytest.raises(ShardError, match=r"a.tar: its sha256 is not .*; .*/tars/a.tar lies outside the set"):
        repair(tmp_path / "set", quiet=True)


def test_a_shard_with_a_url_is_fetched_again_from_there(made, tmp_path):
    directory = shutil.copytree(made[1], tmp_path / "set")
    with serving(made[1]) as url:
        found = manifest.read(directory)
        train = found.splits["train"]
        shards = tuple(replace(shard, url=f"{url}/{shard.name}") for shard in train.shards)
        manifest.write(replace(found, splits=found.splits | {"train": replace(train, shards=shards)}))
        sound = contents(directory)
        flip(directory / "train-00000.tar", 700)
        repair(directory, quiet=True)
        assert contents(directory) == sound

        (directory / "train-00000.tar").unlink()  # it does not have to be here
        assert verify(directory, deep=True, quiet=True) == []


def test_a_kill_at_any_time_leaves_every_file_old_or_new(broken, tmp_path):
    source, directory, sound = broken
    before = contents(directory)
    command = [sys.executable, "-c", "from shards.__main__ import main; import sys; sys.exit(main(sys.argv[1:]))"]
    command += ["verify", str(directory), "--repair", "--from", str(source)]
    for wait in (0.3, 0.6, 0.9, 1.2, 1.5):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(wait)
        process.kill()
        process.wait()
        for name, data in contents_of_files(directory).items():
            assert data in (before.get(name), sound[name])
    repair(directory, str(source), workers=1, quiet=True)
    assert contents(directory) == sound


def contents_of_files(directory: Path):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
