"""Any tree of images as a source: order, splits, labels, and every fault in one line."""

import gc
import json
import os
import warnings

import numpy as np
import pytest
from tiny_celeba import photograph

from shards import image, manifest
from shards.__main__ import main
from shards.checking.verify import verify
from shards.manifest import ShardError
from shards.packing import pack
from shards.packing.plan import Options, plan
from shards.sources import folder


@pytest.fixture
def tree(tmp_path):
    """Two classes with three images each, of four kinds, and a file that is none."""
    root = tmp_path / "pets"
    for name, data in {
        "cats/1.jpg": photograph(1),
        "cats/2.JPG": photograph(2, 30, 40),
        "cats/deep/3.jpeg": photograph(3),
        "dogs/1.png": image.to_png(np.arange(600, dtype=np.uint8).reshape(20, 30, 1)),
        "dogs/2.npy": image.to_npy(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)),
        "dogs/3.jpg": photograph(6),
        "notes.txt": b"",
        "dogs/.hidden.jpg": b"",
        ".trash/1.jpg": b"",
    }.items():
        write(root / name, data)
    return root


NAMES = ["cats/1.jpg", "cats/2.JPG", "cats/deep/3.jpeg", "dogs/1.png", "dogs/2.npy", "dogs/3.jpg"]


def write(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(photograph(0) if data is None else data)


def fails(words, root, **options):
    with pytest.raises(ShardError) as caught:
        folder.read(root, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def table(root, text):
    path = root.with_name("labels.csv")
    path.write_text(text)
    return path


def splits(source):
    return {name: int(split) for name, split in zip(source.images.names, source.split, strict=True)}


def test_a_tree_is_packed_whole_in_the_order_of_its_paths(tree, tmp_path):
    found = pack.pack(plan("pets", folder.read(tree, valid=0), Options()), tmp_path / "set", workers=1, quiet=True)
    assert found.splits.keys() == {"train"}
    assert (found.height, found.width, found.smallest, found.channels) == (None, None, 4, 3)
    assert (found.encoding, found.scaled) == ("jpg, npy, png", False)
    assert found.attributes == ("cats", "dogs")
    assert found.array("train", "labels").tolist() == [[1, 0]] * 3 + [[0, 1]] * 3
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # webdataset leaves its files open
        assert verify(found.directory, deep=True, stock=True, quiet=True) == []
        gc.collect()
    data = found.shard_path("train", 0).read_bytes()
    for number, (name, row) in enumerate(zip(NAMES, found.array("train", "index"), strict=True), 1):
        start, length = int(row["offset"]), int(row["length"])
        assert data[start : start + length] == (tree / name).read_bytes()
        start += length + -length % 512 + 512
        told = json.loads(data[start : data.index(b"\0", start)])
        assert told == {"image_id": number, "attributes": {"cats": number <= 3, "dogs": number > 3}, "file": name}


def test_images_can_be_scaled_to_one_size_whatever_they_are(tree, tmp_path):
    options = Options(npy=16)
    found = pack.pack(plan("pets", folder.read(tree, valid=0), options), tmp_path / "set", workers=1, quiet=True)
    assert (found.encoding, found.height, found.width, found.channels) == ("npy", 16, 16, 3)
    assert verify(found.directory, deep=True, quiet=True) == []


def test_a_folder_of_images_alone_has_no_attributes(tmp_path):
    for i in range(3):
        write(tmp_path / "flat" / "inner" / f"{i}.jpg")
    assert folder.read(tmp_path / "flat").tables.keys() == {"file"}
    assert folder.read(tmp_path / "flat" / "inner").tables.keys() == {"file"}
    assert folder.read(tmp_path, classes=False).tables.keys() == {"file"}


def test_folders_named_after_splits_are_the_splits(tmp_path):
    for name in ("train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "validation/b/1.jpg", "test/a/1.jpg"):
        write(tmp_path / "set" / name)
    source = folder.read(tmp_path / "set")
    assert splits(source) == {
        "test/a/1.jpg": 2, "train/a/1.jpg": 0, "train/b/1.jpg": 0, "val/a/1.jpg": 1, "validation/b/1.jpg": 1,
    }  # fmt: skip
    assert source.tables["attributes"].columns == ("a", "b")
    assert source.tables["attributes"].values[:, 0].tolist() == [1, 1, 0, 1, 0]
    write(tmp_path / "set" / "more" / "1.jpg")
    fails("more/1.jpg lies in none of the folders train, valid (or val) and test", tmp_path / "set")


def test_without_names_a_tenth_is_for_validation_and_stays_there_as_images_are_added(tmp_path):
    for i in range(300):
        write(tmp_path / "set" / f"{i}.jpg", b"")
    before = splits(folder.read(tmp_path / "set"))
    assert 15 <= sum(before.values()) <= 45
    for i in range(300, 400):
        write(tmp_path / "set" / f"{i}.jpg", b"")
    after = splits(folder.read(tmp_path / "set"))
    assert {name: after[name] for name in before} == before
    assert 150 <= sum(splits(folder.read(tmp_path / "set", valid=50)).values()) <= 250
    assert sum(splits(folder.read(tmp_path / "set", valid=0)).values()) == 0
    fails("--valid 100 is impossible", tmp_path / "set", valid=100)
    write(tmp_path / "few" / "1.jpg")
    write(tmp_path / "few" / "2.jpg")
    assert sum(splits(folder.read(tmp_path / "few")).values()) == 1


def test_a_table_gives_attributes_and_splits(tree):
    rows = "file,furry,old,split\n3.jpeg,1,-1,train\ncats/1.jpg,0,1,Val\n"
    rows += "2.JPG,1,1,test\n1.png,1,-1,0\n2.npy,1,-1,1\n3.jpg,0,1,2\n\n"
    source = folder.read(tree, labels=table(tree, "\ufeff" + rows.replace("\n", "\r\n")))
    assert source.images.names == NAMES
    assert source.tables["attributes"].columns == ("furry", "old")
    assert source.tables["attributes"].values.tolist() == [[0, 1], [1, 1], [1, 0], [1, 0], [1, 0], [0, 1]]
    assert source.split.tolist() == [1, 2, 0, 0, 1, 2]
    assert folder.read(tree, labels=table(tree, "file\n" + "\n".join(NAMES))).tables.keys() == {"file"}


def test_rows_without_images_are_counted_and_left_out_on_demand(tree):
    path = table(tree, "file,a\nx.jpg,1\n" + "".join(f"{name},1\n" for name in NAMES) + "y.jpg,1\n")
    fails(
        "2 of 8 images are missing: x.jpg, y.jpg; get them, or pack the others with --allow-missing", tree, labels=path
    )
    assert folder.read(tree, labels=path, allow_missing=True).images.names == NAMES
    fails(
        "2 of 2 images are missing: x.jpg, y.jpg; get them",
        tree, labels=table(tree, "file,a\nx.jpg,1\ny.jpg,1\n"), allow_missing=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it needs a line that names the columns"),
        ("file,a\n", "and one for every image"),
        ("file,a,a\n1.png,1,1\n", "line 1: the columns must have names, each another"),
        ("file,a\n1.png,1,1\n", "line 2: 3 values where line 1 has 2 columns"),
        ("file,a\n1.png,1\n\n1.png,1\n", "line 4: 1.png was in line 2 already"),
        ("file,a\n1.png,yes\n", "line 2: 1.png: a is yes; an attribute must be 0 or 1, or -1 or 1"),
        ("file,a\n1.png,-1\n2.npy,0\n", "line 3: 2.npy: a is 0; an attribute must be -1 or 1"),
        ("file,split\n1.png,training\n", "line 2: split is training; it must be train, valid or test"),
        ("file,a\n1.png,1\ndogs/1.png,1\n", "dogs/1.png and 1.png are the same file"),
        ("file,a\n1.png,1\n", "has no row for 5 of the 6 images in"),
        ("file,a\n\xe9\"\"\n", "line 2: 1 values"),
    ],
)  # fmt: skip
def test_a_fault_of_a_table_is_one_line(tree, text, words):
    fails(words, tree, labels=table(tree, text))


def test_names_that_several_files_have_need_their_paths(tree):
    write(tree / "birds" / "1.jpg")
    rows = [f"{name},1" for name in NAMES[1:]]
    path = table(tree, "\n".join(["file,a", *rows, "1.jpg,1"]))
    fails(
        f"1.jpg is the name of 2 files, birds/1.jpg and cats/1.jpg among them; give paths as from {tree}",
        tree,
        labels=path,
    )


def test_faults_of_a_tree_are_one_line_each(tree, tmp_path):
    (tmp_path / "empty").mkdir()
    fails("empty: no image (.jpg, ", tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        folder.read(tmp_path / "nowhere")
    (tree / "loop").symlink_to(tree)
    fails("loop: a link to a folder in which it lies", tree)
    (tree / "loop").unlink()
    (tree / "lost.jpg").symlink_to(tree / "nowhere")
    fails("lost.jpg: a link to nothing", tree)
    (tree / "lost.jpg").unlink()
    os.mkfifo(tree / "pipe.jpg")
    fails("pipe.jpg: named as an image, but not a file", tree)
    (tree / "pipe.jpg").unlink()
    write(tree / "a\nb.jpg")
    fails(r"the name 'a\nb.jpg' is not plain UTF-8", tree)
    (tree / "a\nb.jpg").unlink()
    write(tree / "train" / "1.jpg")
    fails("cats/1.jpg lies in none of the folders", tree)
    (tree / "dogs").rename(tree / "test")
    (tree / "cats").rename(tree / "valid")
    labels = "".join(f"{name},0\n" for name in [*folder.read(tree).images.names])
    fails("its folders name splits, and so does the table", tree, labels=table(tree, "file,split\n" + labels))


def test_too_many_folders_are_no_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "CLASSES", 2)
    for i in range(3):
        write(tmp_path / "set" / str(i) / "1.jpg")
    fails("3 folders are too many for classes (at most 2); name attributes with --labels FILE.csv", tmp_path / "set")
    assert folder.read(tmp_path / "set", classes=False).tables.keys() == {"file"}


def test_a_link_to_a_folder_elsewhere_is_followed(tree, tmp_path):
    write(tmp_path / "elsewhere" / "1.jpg")
    (tree / "birds").symlink_to(tmp_path / "elsewhere")
    assert folder.read(tree).images.names == ["birds/1.jpg", *NAMES]


def test_the_command_line_packs_a_tree_and_names_what_is_no_image(tree, tmp_path, capsys):
    assert main(["pack", "folder", str(tree), str(tmp_path / "set"), "--valid", "40", "--workers", "1"]) == 0
    found = manifest.read(tmp_path / "set")
    assert (found.name, set(found.splits)) == ("pets", {"train", "valid"})
    write(tree / "dogs" / "4.png", b"GIF89a")
    for words, *arguments in (
        (f"{tree}: dogs/4.png is not an image (jpg, png, webp or npy)", tmp_path / "other"),
        (f"{tree / 'inner'}: lies inside {tree}", tree / "inner"),
        ("--allow-missing leaves out what --labels FILE.csv names", tmp_path / "other", "--allow-missing"),
        ("nowhere.csv: No such file or directory", tmp_path / "other", "--labels", tmp_path / "nowhere.csv"),
        ("holds another data set", tmp_path / "set", "--labels", "none"),
    ):
        capsys.readouterr()
        assert main(["pack", "folder", str(tree), *map(str, arguments), "--workers", "1"]) == 1
        assert words in capsys.readouterr().err
