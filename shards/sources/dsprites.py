"""The dSprites set (Matthey et al. 2017), drawn from the outlines of its three shapes without a download.

A pixel is on where its centre lies inside the shape: pixel (row i, column j) has its centre at (j + 0.5, i + 0.5), y
down, and a shape stands at 16 + 32 * position. The outlines, in pixels at scale 1, are fitted to the published images:
of 270 genuine ones drawn again, one pixel in all differs. The heart is upright, the same left and right, and
given by its radius at every half degree from its top; the radius is linear in the angle between these, and the outline
straight between 1/8 degrees.
"""

from __future__ import annotations

import json
from functools import cache
from math import cos, pi, prod, sin
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]

SIDE = 64  # pixels; one row of an image is one 64-bit word
SHAPE = (SIDE, SIDE)
POSITIONS = tuple(np.linspace(0, 1, 32).tolist())
FACTORS: dict[str, tuple[float, ...]] = {  # by its official name and in its official order: a factor's values
    "color": (1.0,),  # white
    "shape": (1.0, 2.0, 3.0),  # square, ellipse, heart
    "scale": tuple(np.linspace(0.5, 1, 6).tolist()),
    "orientation": tuple(np.linspace(0, 2 * pi, 40).tolist()),  # radians anticlockwise as seen; the last is the first
    "posX": POSITIONS,
    "posY": POSITIONS,
}
SIZES = tuple(len(values) for values in FACTORS.values())
COUNT = prod(SIZES)  # images, numbered row-major: posY changes fastest

CENTRES = 16 + 32 * np.array(POSITIONS)
LINES = (np.arange(SIDE) + 0.5 - CENTRES[:, None]).ravel()  # [32 * 64] height of every row from a shape at every posY
LINES_ORDER = np.argsort(LINES, kind="stable")
EIGHTHS = 2880  # of a degree in a full turn


def factors(rows: NDArray[Any]) -> NDArray[np.float32]:
    """float32 [n, 6]: the factors' values of images `rows` [n]; ValueError for a row outside 0 .. COUNT - 1."""
    classes = np.unravel_index(rows, SIZES)
    return np.stack(
        [np.array(values, np.float32)[i] for values, i in zip(FACTORS.values(), classes, strict=True)], axis=1
    )


def images(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """uint8 [n, 64, 64] of 0 and 1: images `rows` [n] of the set; ValueError for a row outside 0 .. COUNT - 1."""
    _, shape, scale, orientation, pos_x, pos_y = np.unravel_index(rows, SIZES)
    sprite = np.ravel_multi_index((shape, scale, orientation), SIZES[1:4])
    order = np.argsort(sprite, kind="stable")
    starts = np.flatnonzero(np.diff(sprite[order], prepend=-1))
    out = np.empty((len(sprite), *SHAPE), np.uint8)
    for chosen in np.split(order, starts[1:]):
        if len(chosen):
            first = chosen[0]
            crossings = _crossings(int(shape[first]), int(scale[first]), int(orientation[first]))
            out[chosen] = _fill(crossings, pos_x[chosen], pos_y[chosen])
    return out


def _fill(crossings: Floats, pos_x: NDArray[np.intp], pos_y: NDArray[np.intp]) -> NDArray[np.uint8]:
    """uint8 [n, 64, 64] by even and odd: the bits of a row toggle at every crossing of the outline."""
    columns = np.ceil(crossings[:, pos_y] + (CENTRES[pos_x, None] - 0.5))  # the first pixel centre past a crossing
    toggles = np.left_shift(np.uint64(2**64 - 1), columns.astype(np.int64).view(np.uint64))
    words = np.bitwise_xor.reduce(toggles, axis=0)  # [n, 64]
    return np.unpackbits(words.astype("<u8", copy=False).view(np.uint8), bitorder="little").reshape(-1, *SHAPE)


@cache
def _crossings(shape: int, scale: int, orientation: int) -> Floats:
    """[even, 32, 64] x from the centre where the line of every row, for every posY, meets the outline."""
    size = FACTORS["scale"][scale]
    turn = -2 * pi * (orientation % (SIZES[3] - 1)) / (SIZES[3] - 1)
    outlines = _outlines()
    if shape == 1:
        crossings = _cross_ellipse(size * outlines["ellipse"], turn)
    else:
        crossings = _cross_polygon(size * outlines["square" if shape == 0 else "heart"], turn)
    return crossings.reshape(-1, SIZES[5], SIDE)


@cache
def _outlines() -> dict[str, Floats]:
    """Corners [n, 2] of the square and the heart and half axes [2] of the ellipse, in pixels at scale 1."""
    read = json.loads(Path(__file__).with_name("dsprites_outlines.json").read_text())
    radii = read["heart_radius_by_half_degree_0_to_180"]
    half = np.interp(np.arange(EIGHTHS // 2 + 1) / 4, np.arange(len(radii)), radii)
    radius = np.concatenate([half, half[-2:0:-1]])
    angle = np.arange(EIGHTHS) * (2 * pi / EIGHTHS)
    return {
        "square": read["square_half_side"] * np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]),
        "ellipse": np.array(read["ellipse_half_axes"]),
        "heart": np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1),
    }


def _cross_ellipse(axes: Floats, turn: float) -> Floats:
    """[2, lines] from the ellipse's equation at a fixed y, quadratic in x; both are one where it has no root."""
    c, s = cos(turn), sin(turn)
    p, q = 1 / axes**2
    a, b = p * c * c + q * s * s, (p - q) * c * s * LINES
    root = np.sqrt(np.maximum(b * b - a * ((p * s * s + q * c * c) * LINES * LINES - 1), 0))
    return np.stack([-b - root, -b + root]) / a


def _cross_polygon(corners: Floats, turn: float) -> Floats:
    """[even, lines] of a polygon; zeros, an even number of them, where a line has fewer crossings than another."""
    c, s = cos(turn), sin(turn)
    x, y = c * corners[:, 0] - s * corners[:, 1], s * corners[:, 0] + c * corners[:, 1]
    dx, dy = np.roll(x, -1) - x, np.roll(y, -1) - y
    ends = np.sort(np.stack([y, np.roll(y, -1)]), axis=0)
    first, stop = np.searchsorted(LINES, ends, sorter=LINES_ORDER)  # an edge owns its lower end: no corner counts twice
    counts = stop - first
    edge = np.repeat(np.arange(len(x)), counts)
    place = np.arange(len(edge)) + np.repeat(first - np.cumsum(counts) + counts, counts)
    by_line = np.argsort(place, kind="stable")
    edge, place = edge[by_line], place[by_line]
    line = LINES_ORDER[place]
    slot = np.arange(len(place)) - np.searchsorted(place, place)
    crossings = np.zeros((slot.max() + 1, len(LINES)))
    crossings[slot, line] = x[edge] + (LINES[line] - y[edge]) * (dx[edge] / dy[edge])
    return crossings
