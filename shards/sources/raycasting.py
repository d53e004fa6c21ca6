"""Casts rays into a room with one object, and gathers for every pixel the light of the surfaces it sees.

World axes: the floor is z = 0, the two walls seen are x = WALL and y = WALL, and the object stands in the middle. The
camera circles the object by the orientation, from the view into the corner. Surfaces are matt, under an ambient light
and a square lamp fixed to the room; the 4 x 4 samples of a pixel see one sixteenth of the lamp each: a soft shadow.

Everything is sums, products, quotients, roots and comparisons of single elements, which IEEE 754 rounds exactly: the
number of threads changes no bit. A shape is given by its number: 0 cube, 1 cylinder, 2 sphere, 3 capsule.
"""

from __future__ import annotations

from math import cos, radians, sin, sqrt
from typing import Any, TypeAlias

import torch
from torch import Tensor

Plane: TypeAlias = Any  # float32 [samples, 64, 64], or one number for all of them
Vector: TypeAlias = tuple[Plane, Plane, Plane]

SIDE = 64  # pixels
GRID = 4  # samples of a pixel in each direction
FLOOR, WALLS, OBJECT = range(3)
WALL = 3.5
FORMS = ((0.75, 0.75), (0.75, 0.8), (0.9, 0.9), (0.6, 1.05))  # half width and half height of each shape at scale 1
EYE_DISTANCE, EYE_HEIGHT, AIM_HEIGHT = 8.0, 3.6, 0.75
HALF_VIEW = 0.27  # tangent of half the angle of view
LAMP, LAMP_SIDE = (-3.5, -1.5, 6.0), 1.6
AMBIENT, DIFFUSE = 0.35, 0.65


def render(shape: int, size: float, orientation: float, device: str) -> Tensor:
    """float32 [surface, 64, 64]: each surface's light, 0 .. 1, times its share of a pixel."""
    surface, light = look(shape, size, eye(orientation), rays(orientation, device))
    planes = torch.stack([light * (surface == i) for i in (FLOOR, WALLS, OBJECT)])
    total = planes[:, 0]
    for sample in range(1, GRID * GRID):  # in this order: a library's sum promises none
        total = total + planes[:, sample]
    return total / GRID**2


def ahead(orientation: float) -> tuple[float, float]:
    """Where along the floor the camera looks, a unit vector; orientation in degrees, 0 into the corner."""
    angle = radians(45 + orientation)
    return cos(angle), sin(angle)


def eye(orientation: float) -> Vector:
    """Where the camera stands; orientation in degrees."""
    x, y = ahead(orientation)
    return -EYE_DISTANCE * x, -EYE_DISTANCE * y, EYE_HEIGHT


def rays(orientation: float, device: str) -> Vector:
    """Directions through every pixel's samples, not of unit length, row-major from the top left corner."""
    drop = EYE_HEIGHT - AIM_HEIGHT
    length = sqrt(EYE_DISTANCE**2 + drop**2)
    level, fall = EYE_DISTANCE / length, drop / length
    number = torch.arange(SIDE * GRID, dtype=torch.float32, device=device).reshape(SIDE, GRID).T
    place = ((number + 0.5) * (2 / (SIDE * GRID)) - 1) * HALF_VIEW
    up, right = -place[:, None, :, None], place[None, :, None, :]  # [sample down, sample across, row, column]
    out = level + fall * up  # away from the camera, along the floor
    x, y = ahead(orientation)
    directions = torch.broadcast_tensors(x * out + y * right, y * out - x * right, level * up - fall)
    return tuple(direction.reshape(-1, SIDE, SIDE) for direction in directions)


def look(shape: int, size: float, start: Vector, way: Vector) -> tuple[Tensor, Tensor]:
    """What each ray meets first, FLOOR, WALLS or OBJECT, and its light, 0 .. 1: two [samples, 64, 64]."""
    width, height = (size * half for half in FORMS[shape])
    to_x, to_y, to_floor = (before((at - s) / w) for at, s, w in zip((WALL, WALL, 0), start, way, strict=True))
    to_room = torch.minimum(torch.minimum(to_x, to_y), to_floor)
    to_object = entry(shape, width, height, (start[0], start[1], start[2] - height), way)
    seen, floor = to_object < to_room, to_floor == to_room
    t = torch.minimum(to_object, to_room)
    x, y, z = (s + t * w for s, w in zip(start, way, strict=True))

    to_lamp = tuple(there - here for there, here in zip(lamp(t.device), (x, y, z), strict=True))
    outward = normal(shape, width, height, (x, y, z - height))
    on_object = dot(outward, to_lamp) / torch.sqrt(dot(outward, outward))
    in_room = torch.where(floor, to_lamp[2], torch.where(to_x == to_room, -to_lamp[0], -to_lamp[1]))
    lambert = torch.where(seen, on_object, in_room) / torch.sqrt(dot(to_lamp, to_lamp))
    lit = seen | (entry(shape, width, height, (x, y, z - height), to_lamp) > 1)
    light = AMBIENT + DIFFUSE * torch.clamp(lambert, min=0) * lit
    return torch.where(seen, OBJECT, torch.where(floor, FLOOR, WALLS)), light


def lamp(device: torch.device) -> Vector:
    """The points of the lamp that light a pixel's samples, [samples, 1, 1], in another order than that in the pixel."""
    number = 7 * torch.arange(GRID * GRID, device=device)[:, None, None] % GRID**2
    x, y = (((i.float() + 0.5) / GRID - 0.5) * LAMP_SIDE for i in (number // GRID, number % GRID))
    return LAMP[0] + x, LAMP[1] + y, LAMP[2]


# ----------------------------------------------------------------------------------- shapes, around their own centres


def dot(a: tuple[Plane, ...], b: tuple[Plane, ...]) -> Plane:
    products = [p * q for p, q in zip(a, b, strict=True)]
    return sum(products[1:], start=products[0])


def before(t: Tensor) -> Tensor:
    """The times t, inf in place of those behind the start."""
    return torch.where(t > 0, t, torch.inf)


def entry(shape: int, width: float, height: float, start: Vector, way: Vector) -> Tensor:
    """After how many times `way` a shape is entered; inf where it is not."""
    x, y, z = start
    if shape == 0:
        return meet(slab(x, way[0], width), slab(y, way[1], width), slab(z, way[2], height))
    core = height - width if shape > 1 else height  # half the straight part
    tube = meet(ball((x, y), way[:2], width), slab(z, way[2], core))
    if shape == 1:
        return tube
    ends = [meet(ball((x, y, z - end), way, width)) for end in (core, -core)]
    return torch.minimum(tube, torch.minimum(*ends))


def slab(start: Plane, way: Plane, half: float) -> tuple[Tensor, Tensor]:
    """The times at which a ray enters and leaves the space between two planes."""
    a, b = (-half - start) / way, (half - start) / way
    return torch.minimum(a, b), torch.maximum(a, b)


def ball(start: tuple[Plane, ...], way: tuple[Plane, ...], radius: float) -> tuple[Tensor, Tensor]:
    """The times at which a ray enters and leaves a sphere or, of two coordinates, an upright tube."""
    a, b, c = dot(way, way), dot(start, way), dot(start, start) - radius * radius
    inside = b * b - a * c
    root = torch.sqrt(torch.clamp(inside, min=0))
    return (-b - root) / a, (root - b) / a


def meet(*intervals: tuple[Tensor, Tensor]) -> Tensor:
    """The time at which a ray enters all of them at once; inf if it does not or only behind its start."""
    enter, leave = intervals[0]
    for start, end in intervals[1:]:
        enter, leave = torch.maximum(enter, start), torch.minimum(leave, end)
    return torch.where((enter < leave) & (enter > 0), enter, torch.inf)


def normal(shape: int, width: float, height: float, point: Vector) -> Vector:
    """The outward normal, not of unit length, at a point of the surface."""
    x, y, z = point
    if shape > 1:
        core = height - width
        return x, y, z - torch.clamp(z, -core, core)
    side = torch.maximum(torch.abs(x), torch.abs(y)) if shape == 0 else torch.sqrt(x * x + y * y)
    top = torch.abs(z) * width > side * height
    if shape == 1:
        return x * ~top, y * ~top, z * top
    first = torch.abs(x) == side
    return x * (first & ~top), y * ~(first | top), z * top
