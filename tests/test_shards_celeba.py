import zipfile

import numpy as np
import pytest
from tiny_celeba import ATTRIBUTES, add_options, as_csv, label, names, photograph, write_source, zip_images

from shards.manifest import ShardError
from shards.sources import celeba


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source")


@pytest.fixture
def plain(tmp_path_factory):
    """What `source` holds, read from an untouched copy of it."""
    return celeba.read(write_source(tmp_path_factory.mktemp("plain")))


def read_bytes(data):
    return list(data.images.read())


def assert_same(a, b):
    assert a.images.names == b.images.names
    assert np.array_equal(a.numbers, b.numbers)
    assert list(a.images.crc32s()) == list(b.images.crc32s())
    assert read_bytes(a) == read_bytes(b)
    assert np.array_equal(a.split, b.split)
    assert a.tables.keys() == b.tables.keys()
    for entry in a.tables:
        assert a.tables[entry].columns == b.tables[entry].columns
        assert a.tables[entry].values.dtype == b.tables[entry].values.dtype
        assert np.array_equal(a.tables[entry].values, b.tables[entry].values)


def fails(source, *words):
    with pytest.raises(ShardError) as caught:
        celeba.read(source)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_plain_source_is_read_whole(source):
    add_options(source)
    data = celeba.read(source)
    assert data.images.names == names(12)
    assert data.numbers.tolist() == list(range(1, 13))
    assert data.bytes.tolist() == [len(photograph(image)) for image in range(1, 13)]
    assert read_bytes(data) == [photograph(image) for image in range(1, 13)]
    assert data.split.tolist() == [0] * 8 + [1] * 2 + [2] * 2
    assert data.tables["attributes"].columns == ATTRIBUTES
    assert data.tables["attributes"].values.dtype == np.uint8
    assert data.tables["attributes"].values.tolist() == [[label(i, k) > 0 for k in range(3)] for i in range(1, 13)]
    assert data.tables["identity"].values.tolist() == [i % 5 + 1 for i in range(1, 13)]
    assert data.tables["landmarks"].values[2].tolist() == list(range(30, 40))
    assert data.tables["bbox"].columns == ("x_1", "y_1", "width", "height")
    assert data.tables["bbox"].values[2].tolist() == [3, 6, 3000, 12]
    assert data.tables["factors"].columns == ("hue", "turn")
    assert np.array_equal(data.tables["factors"].values[2], np.array([0.3, -3], np.float32))


def test_lists_that_mirrors_lack_are_optional(source):
    assert celeba.read(source).tables.keys() == {"attributes"}


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_zip_is_read_in_place(source, plain, compression):
    zip_images(source, compression)
    assert_same(plain, celeba.read(source))
    assert [path.name for path in source.iterdir() if path.is_dir()] == []


def test_of_a_zip_and_a_folder_the_zip_is_read(source):
    zip_images(source)
    (source / "img_align_celeba").mkdir()
    (source / "img_align_celeba" / "000001.jpg").write_bytes(b"partly extracted")
    assert read_bytes(celeba.read(source))[0] == photograph(1)


def test_csv_lists_say_the_same_as_txt_lists(source, tmp_path):
    add_options(source)
    other = write_source(tmp_path / "other")
    add_options(other)
    as_csv(other)
    assert not list(other.glob("*.txt"))
    assert_same(celeba.read(source), celeba.read(other))


@pytest.mark.parametrize("csv", [False, True])
def test_line_ends_of_windows_trailing_blanks_and_a_byte_order_mark_change_nothing(source, tmp_path, csv):
    other = write_source(tmp_path / "other")
    add_options(source)
    add_options(other)
    if csv:
        as_csv(other)
    for path in [*other.glob("*.txt"), *other.glob("*.csv")]:
        text = path.read_text().replace("\n", " \t\r\n") + " \r\n\r\n"
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert_same(celeba.read(source), celeba.read(other))


def test_the_nesting_of_kaggle_and_the_three_folders_of_the_authors_are_found(source, plain, tmp_path):
    images = source / "img_align_celeba"
    images.rename(source / "inner")
    images.mkdir()
    (source / "inner").rename(images / "img_align_celeba")
    assert_same(plain, celeba.read(source))
    for folder in ("Img", "Anno", "Eval"):
        (source / folder).mkdir()
    (images / "img_align_celeba").rename(source / "Img" / "img_align_celeba")
    images.rmdir()
    (source / "list_attr_celeba.txt").rename(source / "Anno" / "list_attr_celeba.txt")
    (source / "list_eval_partition.txt").rename(source / "Eval" / "list_eval_partition.txt")
    assert_same(plain, celeba.read(source))
    assert_same(plain, celeba.read(tmp_path))


def test_rows_may_come_in_any_order_and_differently_in_every_file(source, plain):
    for name, head in (("list_attr_celeba.txt", 2), ("list_eval_partition.txt", 0)):
        lines = (source / name).read_text().splitlines()
        (source / name).write_text("\n".join(lines[:head] + lines[: head - 1 if head else None : -1]))
    edit(source / "list_eval_partition.txt", "000003.jpg 0\n", "")
    with (source / "list_eval_partition.txt").open("a") as file:
        file.write("\n000003.jpg 0")
    assert_same(plain, celeba.read(source))


def test_missing_sources_and_lists_are_named(source, tmp_path):
    fails(tmp_path / "nowhere", "nowhere", "no such folder")
    (source / "list_eval_partition.txt").rename(tmp_path / "elsewhere")
    fails(source, "no list_eval_partition.txt")
    (tmp_path / "elsewhere").rename(source / "list_eval_partition.txt")
    (source / "list_attr_celeba.txt").unlink()
    fails(source, "no list_attr_celeba.txt")
    fails(source / "img_align_celeba", "no list_eval_partition.txt")


def test_missing_images_are_counted_and_the_first_named(source):
    for image in (2, 5, 7, 9):
        (source / "img_align_celeba" / f"{image:06d}.jpg").unlink()
    fails(source, "4 of 12 images are missing: 000002.jpg, 000005.jpg, 000007.jpg, ...")


def test_a_source_without_images_is_refused(source):
    for path in (source / "img_align_celeba").iterdir():
        path.unlink()
    fails(source, "neither img_align_celeba.zip nor a folder img_align_celeba/")


def test_a_declared_count_that_is_wrong_is_refused(source):
    edit(source / "list_attr_celeba.txt", "12\n", "13\n")
    fails(source, "list_attr_celeba.txt: line 1 declares 13 images, but 12 follow")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("000003.jpg  1  1", "000003.jpg  1  0", "line 5: 000003.jpg: Young is 0; an attribute must be -1 or 1"),
        ("000003.jpg  1  1", "000003.jpg  1  x", "line 5: 000003.jpg: a value is not a number"),
        ("000003.jpg  1  1", "000003.jpg  1  1000", "line 5: 000003.jpg: 1000 is out of range"),
        ("000003.jpg  1  1", "000003.jpg  1", "line 5: 000003.jpg: 2 values where 3 are expected"),
        ("000003.jpg", "face.jpg", "line 5: 'face.jpg' is not an image name"),
        ("000003.jpg", "000002.jpg", "000002.jpg is listed more than once"),
        ("000003.jpg", "000033.jpg", "lacks 1 of the images in list_eval_partition.txt, the first is 000003.jpg"),
        ("Male Young", "Young Young", "line 2: the columns must have names, each another"),
    ],
)
def test_a_fault_in_a_list_is_named_by_file_line_and_image(source, old, new, words):
    edit(source / "list_attr_celeba.txt", old, new)
    fails(source, f"{source}/list_attr_celeba.txt: {words}")


def test_faults_of_the_partition_are_named(source):
    path = source / "list_eval_partition.txt"
    edit(path, "000004.jpg 0", "000004.jpg 3")
    fails(source, "list_eval_partition.txt: line 4: 000004.jpg: partition is 3; the split must be 0, 1 or 2")
    edit(path, "000004.jpg 3\n", "")
    fails(source, "list_eval_partition.txt: lacks 1 of the images in list_attr_celeba.txt, the first is 000004.jpg")
    edit(path, "000005.jpg 0\n", "000005.jpg 0\n05.jpg 0\n")
    fails(source, "have the same number")
    path.write_text("")
    fails(source, "lists no images")
    path.write_text("000001.jpg 0 0\n")
    fails(source, "line 1: 000001.jpg: 2 values where 1 are expected")


def test_factors_must_be_finite_and_for_every_image(source):
    add_options(source)
    edit(source / "factors.csv", "000002.jpg,0.2", "000002.jpg,nan")
    fails(source, "factors.csv: line 3: 000002.jpg: nan is out of range")
    edit(source / "factors.csv", "000002.jpg,nan,-2\n", "")
    fails(source, "factors.csv: lacks 1 of the images in list_eval_partition.txt")


def test_a_web_page_in_place_of_a_file_is_recognised(source):
    page = "<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>"
    zip_images(source)
    (source / "img_align_celeba.zip").write_text(page)
    fails(source, "img_align_celeba.zip: a web page", "quota")
    (source / "list_attr_celeba.txt").write_text(page)
    fails(source, "list_attr_celeba.txt: a web page", "quota")


def test_a_broken_archive_is_refused(source):
    zip_images(source)
    path = source / "img_align_celeba.zip"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    fails(source, "img_align_celeba.zip: not a zip archive, or its end is missing")
    at = whole.index(photograph(3)) + 100
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    data = celeba.read(source)
    with pytest.raises(ShardError, match=r"img_align_celeba.zip: 000003.jpg is damaged \(its crc32 does not match\)"):
        read_bytes(data)


def test_two_lists_of_one_name_must_agree(source, plain):
    (source / "Anno").mkdir()
    text = (source / "list_attr_celeba.txt").read_text()
    (source / "Anno" / "list_attr_celeba.txt").write_text(text)
    assert_same(plain, celeba.read(source))
    (source / "Anno" / "list_attr_celeba.txt").write_text(text.replace("Male", "Female"))
    fails(source, "list_attr_celeba.txt and", "differ")
