"""The drawn dSprites: the official order and values, the shapes' own equations, and genuine images."""

import hashlib
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from shards.sources import dsprites

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT.parent / "shared" / "data" / "dsprites"
GOLDEN = "f0acc1aa13283d8ea5f6714072183aace1da989e00b64acdf6d7902917e36c17"  # every 97th image; it equals the reference

needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference images are not beside the checkout")


def row_of(**classes):
    return np.ravel_multi_index([classes.get(name, 0) for name in dsprites.FACTORS], dsprites.SIZES)


def random_classes(count, seed=0):
    generator = np.random.default_rng(seed)
    return np.stack([generator.integers(size, size=count) for size in dsprites.SIZES])


def inside(classes):
    """[64, 64] by the shape's own equation at every pixel centre."""
    _, shape, scale, turn, x, y = (values[i] for values, i in zip(dsprites.FACTORS.values(), classes, strict=True))
    outlines = json.loads((ROOT / "shards" / "sources" / "dsprites_outlines.json").read_text())
    i, j = np.indices((64, 64))
    z = (j + 0.5 - 16 - 32 * x + 1j * (i + 0.5 - 16 - 32 * y)) * np.exp(1j * turn) / scale
    if shape == 1:
        return np.maximum(abs(z.real), abs(z.imag)) < outlines["square_half_side"]
    if shape == 2:
        a, b = outlines["ellipse_half_axes"]
        return (z.real / a) ** 2 + (z.imag / b) ** 2 < 1
    radii = outlines["heart_radius_by_half_degree_0_to_180"]
    return abs(z) < np.interp(abs(np.angle(1j * z)), np.linspace(0, np.pi, len(radii)), radii)


def test_the_rows_count_every_combination_with_the_last_factor_fastest():
    assert dsprites.COUNT == 737_280
    rows = np.array([0, 1, 32, 1024, 40 * 1024, 6 * 40 * 1024, 737_279])
    step = np.float32(1 / 31)
    assert dsprites.factors(rows).tolist() == [
        [1, 1, 0.5, 0, 0, 0],
        [1, 1, 0.5, 0, 0, step],
        [1, 1, 0.5, 0, step, 0],
        [1, 1, 0.5, np.float32(2 * np.pi / 39), 0, 0],
        [1, 1, np.float32(0.6), 0, 0, 0],
        [1, 2, 0.5, 0, 0, 0],
        [1, 3, 1, np.float32(2 * np.pi), 1, 1],
    ]


def test_a_row_outside_the_set_is_refused():
    for row in (-1, dsprites.COUNT):
        with pytest.raises(ValueError, match="out of bounds"):
            dsprites.images(np.array([row]))


def test_a_pixel_is_on_where_its_centre_is_inside():
    classes = random_classes(400)
    images = dsprites.images(np.ravel_multi_index(classes, dsprites.SIZES))
    assert images.dtype == np.uint8
    for image, of_one in zip(images, classes.T, strict=True):
        np.testing.assert_array_equal(image, inside(of_one))


def test_any_rows_are_the_images_of_these_rows():
    rows = np.random.default_rng(1).integers(dsprites.COUNT, size=60)
    rows[7] = rows[3]
    np.testing.assert_array_equal(dsprites.images(rows), np.concatenate([dsprites.images(row[None]) for row in rows]))
    assert dsprites.images(rows[:0]).shape == (0, 64, 64)


def test_a_mirrored_heart_is_the_heart_turned_the_other_way():
    classes = random_classes(200, seed=2)
    classes[1] = 2
    mirrored = classes.copy()
    mirrored[3], mirrored[4] = 39 - classes[3], 31 - classes[4]
    first, second = (dsprites.images(np.ravel_multi_index(c, dsprites.SIZES)) for c in (classes, mirrored))
    np.testing.assert_array_equal(first, second[:, :, ::-1])


def test_a_shape_covers_the_area_of_its_outline():
    outlines = json.loads((ROOT / "shards" / "sources" / "dsprites_outlines.json").read_text())
    radii = np.array(outlines["heart_radius_by_half_degree_0_to_180"])
    areas = [
        (2 * outlines["square_half_side"]) ** 2,
        np.pi * np.prod(outlines["ellipse_half_axes"]),
        np.pi * np.mean((radii[1:] ** 2 + radii[1:] * radii[:-1] + radii[:-1] ** 2) / 3),
    ]
    for shape, area in enumerate(areas):
        for scale, size in enumerate(dsprites.FACTORS["scale"]):
            first = row_of(shape=shape, scale=scale, orientation=5)
            # the 31 first positions are all phases of a pixel, so that the mean is the area
            grid = (first + 32 * np.arange(31)[:, None] + np.arange(31)).ravel()
            assert dsprites.images(grid).sum() / 31**2 == pytest.approx(area * size**2, rel=1e-3)


def test_the_images_have_not_changed():
    images = dsprites.images(np.arange(0, dsprites.COUNT, 97))
    assert hashlib.sha256(np.packbits(images).tobytes()).hexdigest() == GOLDEN


@needs_reference
def test_the_factors_are_the_official_values():
    official = np.load(REFERENCE / "dsprites_rendered_64x64.npz")["latents_values"]
    for name, values, column in zip(dsprites.FACTORS, dsprites.FACTORS.values(), official.T, strict=True):
        assert np.unique(column).tolist() == list(values), name
    np.testing.assert_array_equal(dsprites.factors(np.arange(dsprites.COUNT)), official.astype(np.float32))


@needs_reference
def test_the_images_are_the_genuine_ones_but_for_a_pixel_on_an_edge():
    genuine = np.load(REFERENCE / "dsprites_genuine_270.npz")
    images = dsprites.images(np.ravel_multi_index(genuine["latents_classes"].T, dsprites.SIZES))
    assert (images != genuine["imgs"]).sum() <= 2


@needs_reference
def test_the_images_equal_the_reference_in_every_pixel():
    few, every = 64, 7  # images in a row, prime to the sizes: every shape, scale and orientation, at two of 16 places
    with zipfile.ZipFile(REFERENCE / "dsprites_rendered_64x64.npz").open("imgs.npy") as file:
        np.lib.format.read_magic(file)
        assert np.lib.format.read_array_header_1_0(file) == ((dsprites.COUNT, 64, 64), False, np.uint8)
        for first in range(0, dsprites.COUNT, few):
            reference = file.read(
                few * 64 * 64
            )  # all of it: a compressed stream cannot be skipped, which takes the time
            if first // few % every == 0:
                assert dsprites.images(np.arange(first, first + few)).tobytes() == reference, first
