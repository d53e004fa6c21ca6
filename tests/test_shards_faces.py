"""The drawn faces: pure functions of seed and number, smooth and local in their factors."""

import hashlib
import io
import zlib
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from shards.manifest import ShardError
from shards.packing.pack import pack_faces
from shards.packing.plan import Options
from shards.sources import drawing, faces

GOLDEN_FACTORS = [15.667702674865723, 6.031954288482666, 2.746384620666504]
GOLDEN_PORTRAIT = "3264d53550492e7f6ea0cc43a20e6cb919fe5e9f13df86f7e2d2ed93e909e339"  # changes only by intent

INDEX = {factor.name: i for i, factor in enumerate(faces.FACTORS)}
FRONTAL = {
    "yaw": 0, "pitch": 0, "roll": 0, "face_width": 0.1, "skin": 0.3, "hair_colour": 1, "hair_length": 0.5, "parting": 0,
    "fringe": 0.3, "brow_thickness": 0.5, "eye_open": 0.6, "eye_colour": 0.6, "glasses": 0, "mouth_curvature": 0.3,
    "mouth_open": 0.2, "makeup": 0.3, "beard": 0.3, "age": 0.4, "background_hue": 0.5, "background_light": 0.6,
    "light_direction": 0,
}  # fmt: skip


def portrait(**changes):
    face = FRONTAL | changes
    return faces.draw(np.array([face[factor.name] for factor in faces.FACTORS], np.float32)).astype(int)


def changed(first, second):
    """(top, bottom, left, right) of the pixels that differ."""
    rows, columns = np.nonzero((first != second).any(axis=2))
    return rows.min(), rows.max(), columns.min(), columns.max()


@pytest.fixture(scope="module")
def sample():
    return np.stack([faces.sample_factors(0, number) for number in range(1, 2001)])


def test_the_painter_names_the_same_factors_in_the_same_order():
    assert drawing.Face._fields == tuple(factor.name for factor in faces.FACTORS)


def test_factors_stay_in_their_ranges_and_fill_them(sample):
    for factor, values in zip(faces.FACTORS, sample.T, strict=True):
        assert factor.low <= values.min()
        assert values.max() <= factor.high
        if factor.categories:
            shares = [(values == index).mean() for index in range(len(factor.categories))]
            assert shares == pytest.approx(factor.weights, abs=0.03)
            assert sum(factor.weights) == pytest.approx(1)
        else:
            expected = np.linspace(factor.low, factor.high, 12)[1:-1]
            found = np.quantile(values, np.linspace(0, 1, 12)[1:-1])
            assert found == pytest.approx(expected, abs=0.05 * (factor.high - factor.low))


def test_factors_are_drawn_independently_and_differ_between_images_and_seeds(sample):
    correlation = np.corrcoef(sample.T) - np.eye(len(faces.FACTORS))
    assert np.abs(correlation).max() < 0.1
    assert len(np.unique(sample, axis=0)) == len(sample)
    assert not np.array_equal(faces.sample_factors(0, 7), faces.sample_factors(1, 7))
    assert not np.array_equal(faces.sample_factors(0, 1), faces.sample_factors(1, 0))


def test_factors_never_change_between_versions():
    words = np.random.Philox(key=np.array([5, 9], np.uint64)).random_raw(2)
    yaw, pitch = ((int(word) >> 11) / 2**53 for word in words)
    assert faces.sample_factors(5, 9)[:2] == pytest.approx([-25 + 50 * yaw, -12 + 24 * pitch], abs=1e-5)
    assert faces.sample_factors(0, 1)[:3].tolist() == GOLDEN_FACTORS


def test_a_portrait_never_changes_by_a_bit():
    pixels = faces.draw(faces.sample_factors(0, 1))
    assert pixels.shape == (218, 178, 3)
    assert pixels.dtype == np.uint8
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == GOLDEN_PORTRAIT


@pytest.mark.parametrize("factor", faces.FACTORS, ids=lambda factor: factor.name)
def test_each_factor_changes_the_picture_at_every_step(factor):
    values = range(len(factor.categories)) if factor.categories else np.linspace(factor.low, factor.high, 4)
    pictures = [portrait(**{factor.name: value}) for value in values]
    assert all(np.abs(a - b).max() > 12 for a, b in pairwise(pictures))


@pytest.mark.parametrize("factor", [f for f in faces.FACTORS if not f.categories], ids=lambda factor: factor.name)
def test_a_small_step_of_a_factor_is_a_small_change_of_the_picture(factor):
    middle = (factor.low + factor.high) / 2 + 0.01
    small = 1e-3 * (factor.high - factor.low)
    difference = np.abs(portrait(**{factor.name: middle}) - portrait(**{factor.name: middle + small}))
    assert difference.mean() < 0.3
    assert difference.max() < 60


@pytest.mark.parametrize("change", [{}, {"hair_length": 0}, {"beard": 1}, {"age": 1}, {"mouth_open": 1}])
def test_a_frontal_face_under_a_central_lamp_is_symmetric(change):
    picture = portrait(**change)
    assert np.abs(picture - picture[:, ::-1]).max() <= 1


def test_turning_the_head_the_other_way_mirrors_the_picture():
    turned, mirrored = portrait(yaw=20, roll=5, parting=0.5), portrait(yaw=-20, roll=-5, parting=-0.5)
    assert np.abs(turned - mirrored[:, ::-1]).max() <= 1


def test_a_smile_changes_only_the_surroundings_of_the_mouth():
    top, bottom, left, right = changed(portrait(mouth_curvature=-1), portrait(mouth_curvature=1))
    assert top > 130
    assert bottom < 172
    assert left > 55
    assert right < 122


def test_glasses_change_only_the_surroundings_of_the_eyes():
    for kind in (1, 2, 3):
        top, bottom, left, right = changed(portrait(), portrait(glasses=kind))
        assert top > 92
        assert bottom < 132
        assert left > 38
        assert right < 139


def test_the_eyes_lie_where_celeba_aligns_them():
    top, bottom, left, right = changed(portrait(eye_colour=0), portrait(eye_colour=1))
    assert (top + bottom) / 2 == pytest.approx(111, abs=2)
    assert (left + right) / 2 == pytest.approx(88.5)
    iris = right - 109
    assert left == 68 - iris
    assert 2 <= iris <= 7


def test_edges_are_smooth():
    """The backdrop has no jumps, and the slanting edge of a shoulder takes the grey levels between."""
    plain = portrait(skin=0, glasses=0)
    assert np.abs(np.diff(plain[:40], axis=1)).max() <= 4
    assert np.abs(np.diff(plain[:40], axis=0)).max() <= 4
    shoulder = portrait(background_light=1)[190:, :30, 0]
    edge = np.unique(shoulder[(shoulder > shoulder.min() + 10) & (shoulder < shoulder.max() - 10)])
    assert len(edge) > 15


def test_attributes_follow_their_thresholds_and_all_occur(sample):
    labels = np.stack([faces.attributes(factors) for factors in sample])
    assert labels.dtype == np.uint8
    for name, column in zip(faces.ATTRIBUTES, labels.T, strict=True):
        factor, low, high = faces.THRESHOLDS[name]
        values = sample[:, INDEX[factor]]
        assert np.array_equal(column == 1, (values >= low) & (values < high))
        assert 0.05 < column.mean() < 0.95, name
    column = dict(zip(faces.ATTRIBUTES, labels.T, strict=True))
    assert np.array_equal(column["Eyeglasses"] == 1, sample[:, INDEX["glasses"]] > 0)
    colours = sum(column[name] for name in ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair"))
    assert np.array_equal(colours == 0, sample[:, INDEX["hair_colour"]] == 3)  # red has no name in CelebA


def test_a_source_of_faces_holds_pictures_splits_labels_and_factors():
    source = faces.source(20, 3)
    assert source.numbers.tolist() == list(range(1, 21))
    assert source.split.tolist() == [*[0] * 8, 1, 2] * 2
    assert source.tables["attributes"].columns == faces.ATTRIBUTES
    assert source.tables["factors"].columns == tuple(INDEX) == tuple(factor.name for factor in source.factors)
    values, labels = source.tables["factors"].values, source.tables["attributes"].values
    assert (values.dtype, labels.dtype) == (np.float32, np.uint8)
    for number, (row, label) in enumerate(zip(values, labels, strict=True), start=1):
        assert np.array_equal(row, faces.sample_factors(3, number))
        assert np.array_equal(label, faces.attributes(row))
    chosen = source.images.part(np.array([6, 2]))
    assert chosen.names == ["000007.jpg", "000003.jpg"]
    pictures = list(chosen.read())
    assert list(chosen.crc32s()) == [zlib.crc32(data) for data in pictures]
    assert 0.5 < np.mean([len(data) for data in pictures]) / source.bytes.mean() < 2
    for data, row in zip(pictures, values[[6, 2]], strict=True):
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (178, 218)
            assert np.abs(np.asarray(image).astype(int) - faces.draw(row)).mean() < 3


def test_the_images_depend_on_neither_the_count_nor_the_workers(tmp_path):
    options = Options(shard_mb=0.03)

    def packed(name, count, workers):
        return pack_faces(tmp_path / name, count=count, seed=1, options=options, workers=workers, quiet=True)

    one, two, few = packed("one", 12, 1), packed("two", 12, 2), packed("few", 4, 1)
    files = [{path.name: path.read_bytes() for path in found.directory.iterdir()} for found in (one, two)]
    assert files[0] == files[1]
    assert len(one.splits["train"].shards) > 2
    index = [found.array("train", "index")[["length", "crc32", "image"]][:4].tolist() for found in (one, few)]
    assert index[0] == index[1]


def test_quiet_writes_not_a_line(tmp_path, capsys):
    pack_faces(tmp_path / "set", count=1, seed=0, workers=1, quiet=True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("wrong", [{"count": 0}, {"count": 10**6}, {"seed": -1}])
def test_impossible_requests_are_refused_in_one_line(tmp_path, wrong):
    (name, value), = wrong.items()  # fmt: skip
    with pytest.raises(ShardError, match=rf"^drawn faces: {name}={value} is outside .*$"):
        pack_faces(tmp_path / "set", **({"count": 1, "seed": 0} | wrong))
    with pytest.raises(ShardError, match=r"^.*: 0 workers cannot pack; at least one must$"):
        pack_faces(tmp_path / "set", count=1, workers=0)
    assert not (tmp_path / "set").exists()
