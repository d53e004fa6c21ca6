"""The drawn 3D shapes: official factors and order, hues where they belong, geometry by projection, the same bits."""

import colorsys
from itertools import product
from math import cos, pi, radians, sin, sqrt

import numpy as np
import pytest
import torch

from shards.sources import raycasting, shapes3d

NAMES = list(shapes3d.FACTORS)
SURFACES = {"floor_hue": raycasting.FLOOR, "wall_hue": raycasting.WALLS, "object_hue": raycasting.OBJECT}
CUBE, CYLINDER, SPHERE, CAPSULE = range(4)
DISTANCE, HEIGHT, AIM = raycasting.EYE_DISTANCE, raycasting.EYE_HEIGHT, raycasting.AIM_HEIGHT


def row_of(**classes):
    return np.ravel_multi_index([classes.get(name, 0) for name in NAMES], shapes3d.SIZES)


def image(**classes):
    return shapes3d.images(np.array([row_of(**classes)]))[0].astype(int)


def silhouette(shape, scale, orientation):
    """bool [256, 256]: the samples that see the object; scale a number, orientation in degrees."""
    surface, _ = raycasting.look(shape, scale, raycasting.eye(orientation), raycasting.rays(orientation, "cpu"))
    grid, side = raycasting.GRID, raycasting.SIDE
    samples = (surface == raycasting.OBJECT).reshape(grid, grid, side, side)
    return samples.permute(2, 0, 3, 1).reshape(side * grid, side * grid).numpy()


def project(points, orientation):
    """[n, 2] right and down, in samples, of points [n, 3], by the camera's axes."""
    angle = radians(45 + orientation)
    eye = np.array([-DISTANCE * cos(angle), -DISTANCE * sin(angle), HEIGHT])
    ahead = np.array([0, 0, AIM]) - eye
    ahead /= np.linalg.norm(ahead)
    right = np.array([sin(angle), -cos(angle), 0])
    seen = (points - eye) @ np.stack([right, np.cross(ahead, right), ahead], axis=1)
    return 128 + 128 / raycasting.HALF_VIEW * seen[:, :2] / seen[:, 2:]


def test_the_rows_count_every_combination_in_the_official_order():
    assert shapes3d.COUNT == 480_000
    assert NAMES == ["floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation"]
    rows = np.array([0, 1, 15, 60, 480, 4800, 48_000, 479_999])
    np.testing.assert_allclose(
        shapes3d.factors(rows),
        [
            [0, 0, 0, 0.75, 0, -30],
            [0, 0, 0, 0.75, 0, -30 + 60 / 14],
            [0, 0, 0, 0.75, 1, -30],
            [0, 0, 0, 0.75 + 0.5 / 7, 0, -30],
            [0, 0, 0.1, 0.75, 0, -30],
            [0, 0.1, 0, 0.75, 0, -30],
            [0.1, 0, 0, 0.75, 0, -30],
            [0.9, 0.9, 0.9, 1.25, 3, 30],
        ],
        rtol=1e-6,
    )
    with pytest.raises(ValueError, match="out of bounds"):
        shapes3d.images(np.array([shapes3d.COUNT]))


def test_an_image_has_the_same_bytes_in_any_company_and_on_any_number_of_threads():
    rows = np.concatenate([[480, 0, 1, 2], np.random.default_rng(0).integers(shapes3d.COUNT, size=8), np.arange(35)])
    threads = torch.get_num_threads()
    together = shapes3d.images(rows)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            shapes3d.scene.cache_clear()
            alone = np.concatenate([shapes3d.images(row[None]) for row in rows[:14]])
            np.testing.assert_array_equal(alone, together[:14])
    finally:
        torch.set_num_threads(threads)
    assert together.dtype == np.uint8
    assert shapes3d.images(rows[:0]).shape == (0, *shapes3d.SHAPE)


def test_every_value_of_every_factor_gives_another_picture():
    middle = {name: size // 2 for name, size in zip(NAMES, shapes3d.SIZES, strict=True)}
    for name, size in zip(NAMES, shapes3d.SIZES, strict=True):
        rows = np.array([row_of(**(middle | {name: value})) for value in range(size)])
        assert len({picture.tobytes() for picture in shapes3d.images(rows)}) == size, name


@pytest.mark.parametrize("name", SURFACES)
def test_a_hue_changes_the_pixels_of_its_surface_and_no_others(name):
    for shape, orientation in product(range(4), (0, 6, 14)):
        classes = {
            "floor_hue": 1,
            "wall_hue": 4,
            "object_hue": 7,
            "scale": 4,
            "shape": shape,
            "orientation": orientation,
        }
        changed = (image(**classes) != image(**(classes | {name: 9}))).any(axis=2)
        light = shapes3d.scene(4, shape, orientation, "cpu")[SURFACES[name]].numpy()
        assert not changed[light == 0].any()
        assert changed[light > 0.02 * shapes3d.STEPS].all()
        assert 0.02 < changed.mean() < 0.9


def test_colours_are_the_hues_at_full_saturation():
    expected = [[round(255 * c) for c in colorsys.hsv_to_rgb(hue, 1, 1)] for hue in shapes3d.FACTORS["floor_hue"]]
    assert shapes3d.hue_colours().tolist() == expected
    red = image(shape=SPHERE)  # everywhere
    assert (red[:, :, 1:] == 0).all()
    light = shapes3d.scene(0, SPHERE, 0, "cpu").sum(0).numpy() / shapes3d.STEPS
    np.testing.assert_allclose(red[:, :, 0], 255 * light, atol=0.501)


def test_light_is_between_the_shadows_and_full_everywhere():
    for shape, orientation in product(range(4), (0, 7, 14)):
        light = shapes3d.scene(7, shape, orientation, "cpu").sum(0) / shapes3d.STEPS
        assert raycasting.AMBIENT - 1e-3 < light.min() < raycasting.AMBIENT + 0.02  # the core of the shadow
        assert 0.9 < light.max() <= 1


@pytest.mark.parametrize("scale", [0.75, 1.25])
def test_a_sphere_covers_the_ellipse_of_its_projection(scale):
    radius = 0.9 * scale
    eye, centre, aim = np.array([DISTANCE, HEIGHT]), np.array([0, radius]), np.array([0, AIM])
    away, axis = centre - eye, aim - eye
    cosine = away @ axis / np.linalg.norm(away) / np.linalg.norm(axis)  # between the view's axis and the centre
    sine = radius / np.linalg.norm(away)  # of half the cone that touches the sphere
    squeeze = cosine**2 - sine**2
    area = pi * sine * sqrt(1 - sine**2) / squeeze * sine / sqrt(squeeze)  # its half axes at distance 1
    expected = area * (128 / raycasting.HALF_VIEW) ** 2
    assert silhouette(SPHERE, scale, 12.5).sum() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("orientation", [-30, 0, 10])
def test_a_cube_reaches_as_far_as_its_corners(orientation):
    corners = np.array(list(product((-0.9, 0.9), (-0.9, 0.9), (0, 1.8))))
    down, right = np.nonzero(silhouette(CUBE, 1.2, orientation))
    expected = project(corners, orientation)
    assert [right.min(), down.min()] == pytest.approx(expected.min(0), abs=1.5)
    assert [right.max(), down.max()] == pytest.approx(expected.max(0) - 1, abs=1.5)


def test_an_object_is_mirrored_at_the_opposite_orientation():
    for shape in range(4):
        left, right = (silhouette(shape, 1.0, orientation) for orientation in (-20, 20))
        assert (left != right[:, ::-1]).sum() <= 4  # samples on an edge
        turned = silhouette(shape, 1.0, 0)
        assert ((left != turned).sum() > 500) == (shape == CUBE)  # the others are round


def test_the_corner_of_the_room_moves_with_the_orientation():
    for orientation in (-30, 0, 20):
        corner = project(np.array([[raycasting.WALL, raycasting.WALL, 0.0]]), orientation)[0]
        surface, _ = raycasting.look(CAPSULE, 1e-3, raycasting.eye(orientation), raycasting.rays(orientation, "cpu"))
        floor = (surface == raycasting.FLOOR).reshape(4, 4, 64, 64).permute(2, 0, 3, 1).reshape(256, 256)
        top = int(floor.any(1).nonzero()[0])  # the farthest sample of the floor
        assert [float(floor[top].nonzero().float().mean()), top] == pytest.approx(corner, abs=4)


def test_the_floor_is_lit_by_lamberts_law():
    light = raycasting.render(CAPSULE, 0.75, 0.0, "cpu")[raycasting.FLOOR, 63, 32]
    way = [float(part[:, 63, 32].mean()) for part in raycasting.rays(0, "cpu")]
    eye = raycasting.eye(0)
    point = np.array(eye) - eye[2] / way[2] * np.array(way)
    to_lamp = np.array(raycasting.LAMP) - point
    cosine = to_lamp[2] / np.linalg.norm(to_lamp)
    assert float(light) == pytest.approx(raycasting.AMBIENT + raycasting.DIFFUSE * cosine, rel=5e-3)
