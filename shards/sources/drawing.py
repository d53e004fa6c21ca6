"""Paints one portrait of 178 x 218 pixels from its factors, as smooth signed distance fields under one lamp.

Everything is sums, products, quotients, square roots and comparisons, which IEEE 754 rounds exactly: no library sine or
exponential, whose last bit differs between machines, so a portrait has the same bytes wherever it is drawn.

Coordinates are pixels. (x, y) is the head seen by the camera, upright, its origin in the middle of the head, y down;
(u, v) is the same head turned to face the camera, so that a feature drawn in (u, v) follows the pose by itself. Colours
are sRGB as people read them; paint mixes in light of gamma 2, the nearest that a square root can undo.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import sqrt
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 178, 218
CENTRE = (88.5, 116.0)  # of an upright frontal head: column 88.5 is the mirror axis of the 178 columns
RADIUS = (60.0, 82.0)  # the ellipsoid on which features turn; larger than the head, so that its rim stays outside

Plane: TypeAlias = Any  # float32 [rows, columns]; numpy's stubs cannot follow it, they widen float32 * 2.0 to float64
Colour: TypeAlias = tuple[float, float, float]
Box: TypeAlias = tuple[slice, slice]

SKIN: tuple[Colour, ...] = (
    (250, 222, 205),
    (240, 201, 173),
    (222, 173, 138),
    (188, 134, 97),
    (139, 91, 61),
    (88, 56, 39),
)
HAIR: tuple[Colour, ...] = ((34, 29, 31), (98, 62, 38), (214, 172, 104), (156, 68, 34), (168, 167, 168))
IRIS: tuple[Colour, ...] = ((62, 36, 20), (122, 78, 36), (96, 122, 66), (72, 126, 170), (128, 158, 178))
BACKGROUND: tuple[Colour, ...] = ((196, 120, 88), (198, 170, 104), (112, 158, 108), (84, 150, 178), (120, 112, 184))
CLOTHES: tuple[Colour, ...] = ((52, 84, 120), (70, 62, 104), (150, 60, 66), (176, 132, 74), (72, 98, 74))


class Face(NamedTuple):
    """The factors of one portrait, in the units of faces.FACTORS."""

    yaw: float
    pitch: float
    roll: float
    face_width: float
    skin: float
    hair_colour: float
    hair_length: float
    parting: float
    fringe: float
    brow_thickness: float
    eye_open: float
    eye_colour: float
    glasses: float
    mouth_curvature: float
    mouth_open: float
    makeup: float
    beard: float
    age: float
    background_hue: float
    background_light: float
    light_direction: float


# ---------------------------------------------------------------------------------------------------- small mathematics


def sine_cosine(degrees: float) -> tuple[float, float]:
    """Sine and cosine of an angle within 90 degrees, without a mathematical library."""
    a = degrees * 0.017453292519943295
    s = a * (1 - a * a / 6 * (1 - a * a / 20 * (1 - a * a / 42 * (1 - a * a / 72))))
    return s, sqrt(max(1 - s * s, 0.0))


def step(start: float, end: float, x: Plane) -> Plane:
    """0 before `start`, 1 after `end`, smooth between; `start` may be the larger."""
    t = x - start
    t *= 1 / (end - start)
    np.maximum(t, 0, out=t)
    np.minimum(t, 1, out=t)
    smooth = t * -2
    smooth += 3
    smooth *= t
    smooth *= t
    return smooth


def scalar_step(start: float, end: float, x: float) -> float:
    t = min(max((x - start) / (end - start), 0.0), 1.0)
    return t * t * (3 - 2 * t)


def cover(distance: Plane, softness: float = 0.8) -> Plane:
    """The share of a pixel inside a shape, given the signed distance to its edge (negative inside)."""
    return step(softness, -softness, distance)


def bump(x: Plane, y: Plane, a: float, b: float) -> Plane:
    """A smooth hill of height 1 over the ellipse with half axes a and b, exactly 0 outside."""
    p, q = x * (1 / a), y * (1 / b)
    t = 1 - p * p - q * q
    np.maximum(t, 0, out=t)
    return t * t


def ellipse(x: Plane, y: Plane, a: float, b: float) -> Plane:
    """Signed distance to an ellipse with half axes a and b, to first order near its edge."""
    p, q = x * (1 / a), y * (1 / b)
    p, q = p * p, q * q
    k = np.sqrt(p + q + 1e-6)
    return k * (k - 1) / np.sqrt(p * (1 / a**2) + q * (1 / b**2) + 1e-6 / (a * b))


def smooth_min(a: Plane, b: Plane, k: float) -> Plane:
    """The minimum of two distances, rounded off where they differ by less than k."""
    h = np.maximum(k - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h * (0.25 / k)


def smooth_max(a: Plane, b: Plane, k: float) -> Plane:
    h = np.maximum(k - np.abs(a - b), 0)
    return np.maximum(a, b) + h * h * (0.25 / k)


def ramp(colours: tuple[Colour, ...], t: float) -> Colour:
    """The colour at t in 0..1 along equally spaced stops."""
    place = min(max(t, 0.0), 1.0) * (len(colours) - 1)
    i = min(int(place), len(colours) - 2)
    return mix(colours[i], colours[i + 1], place - i)


def mix(a: Colour, b: Colour, t: float) -> Colour:
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


@cache
def _noise() -> Plane:
    """[1025] fixed periodic noise in -1..1, one value a lattice point."""
    raw = np.random.Philox(key=np.array([218, 178], np.uint64)).random_raw(1024)
    values = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1
    return np.append(values, values[0]).astype(np.float32)


def noise(x: Plane) -> Plane:
    """Piecewise smooth noise in -1..1 along x, with one knot an integer."""
    floor = np.floor(x)
    t = x - floor
    i = floor.astype(np.intp)
    i &= 1023
    table = _noise()
    left = table.take(i)
    i += 1
    return left + (table.take(i) - left) * (t * t * (3 - 2 * t))


def grain(x: Plane, y: Plane) -> Plane:
    """Smooth noise in -1..1 over a plane, with one knot in every unit square."""
    fx, fy = np.floor(x), np.floor(y)
    s, t = x - fx, y - fy
    s, t = s * s * (3 - 2 * s), t * t * (3 - 2 * t)
    i = 73 * fx.astype(np.intp) + 411 * fy.astype(np.intp)
    table = _noise()
    near, far = table.take(i & 1023), table.take((i + 411) & 1023)
    near = near + (table.take((i + 73) & 1023) - near) * s
    far = far + (table.take((i + 484) & 1023) - far) * s
    return near + (far - near) * t


# ---------------------------------------------------------------------------------------------------- canvas and camera


def box(top: int, bottom: int, left: int = 0, right: int | None = None) -> Box:
    """A part of the frame large enough for what is painted into it; only speed depends on it."""
    return slice(top, bottom), slice(left, right)


@dataclass(frozen=True)
class Canvas:
    """Light [3, rows, columns] that layers are painted onto, back to front."""

    light: NDArray[Any]

    def crop(self, part: Box) -> Canvas:
        return Canvas(self.light[:, part[0], part[1]])

    def paint(self, colour: Colour, alpha: Plane, shade: Plane | float = 1.0, warmth: float = 0.0) -> None:
        """Lays a colour lit by `shade` (1 = as given) over what is there; `warmth` lets red survive in the shadow."""
        blood = shade * (1 - shade)
        for plane, channel, glow in zip(self.light, colour, (1.0, 0.1, -0.25), strict=True):
            full = channel * channel / 65025
            plane += alpha * (full * shade + full * warmth * glow * blood - plane)

    def glow(self, colour: Colour, alpha: Plane) -> None:
        """Adds light of a colour: a reflection."""
        for plane, channel in zip(self.light, colour, strict=True):
            plane += alpha * (channel * channel / 65025)

    def darken(self, colour: Colour, alpha: Plane) -> None:
        """Multiplies by a colour where alpha is 1: a shadow or a stain."""
        for plane, channel in zip(self.light, colour, strict=True):
            plane *= 1 - alpha * (1 - channel / 255)

    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [rows, columns, 3]"""
        tones = np.sqrt(np.clip(self.light, 0, 1)) * 255 + 0.5
        return np.ascontiguousarray(tones.astype(np.uint8).transpose(1, 2, 0))


@dataclass(frozen=True, kw_only=True)
class View:
    """Where every pixel lies on the posed head, and the lamp."""

    x: Plane
    y: Plane
    u: Plane
    v: Plane
    turn: tuple[float, float]  # sine of yaw (to the right) and of pitch (down)
    lean: float  # pixels the head moved to the right to keep the face in the middle
    lamp: tuple[float, float, float]  # unit vector to the light

    def forward(self, u: float, v: float) -> tuple[float, float]:
        """(x, y) of a point (u, v) of the head's surface."""
        (sy, sp), (a, b) = self.turn, RADIUS
        p, q = u / a, v / b
        r = sqrt(max(1 - p * p - q * q, 0.0))
        cy, cp = sqrt(1 - sy * sy), sqrt(1 - sp * sp)
        p, r = p * cy + r * sy, r * cy - p * sy
        return a * p, b * (q * cp + r * sp)

    def crop(self, part: Box) -> View:
        x, y, u, v = (plane[part] for plane in (self.x, self.y, self.u, self.v))
        return View(x=x, y=y, u=u, v=v, turn=self.turn, lean=self.lean, lamp=self.lamp)


@cache
def _grid() -> tuple[Plane, Plane]:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    return columns - np.float32(CENTRE[0]), rows - np.float32(CENTRE[1])


def look(f: Face) -> View:
    """Sets up camera and lamp."""
    (sy, cy), (sp, cp), (sr, cr) = sine_cosine(f.yaw), sine_cosine(f.pitch), sine_cosine(f.roll)
    (a, b), (gx, gy) = RADIUS, _grid()
    lean = -0.65 * a * sy
    dx, dy = gx - lean, gy + 0.6 * b * sp
    x, y = dx * cr + dy * sr, dy * cr - dx * sr
    p, q = x * (1 / a), y * (1 / b)
    t = 1 - p * p - q * q
    r = np.sqrt(0.5 * (t + np.sqrt(t * t + 0.02)))  # depth, with a soft rim in place of the sphere's edge
    q, r = q * cp - r * sp, r * cp + q * sp
    u, v = a * (p * cy - r * sy), b * q
    la, lc = sine_cosine(65 * f.light_direction)
    return View(x=x, y=y, u=u, v=v, turn=(sy, sp), lean=lean, lamp=(0.87 * la, -0.48, 0.87 * lc))


def lambert(view: View, relief: Plane | None = None, radius: tuple[float, float] = (64.0, 88.0)) -> Plane:
    """Light on the ellipsoid with a relief [pixels] on it: about 1 where it faces the lamp, 0.25 in the shade."""
    nx, ny = view.x * (1 / radius[0]), view.y * (1 / radius[1])
    nz = np.sqrt(np.maximum(1 - nx * nx - ny * ny, 0.08))
    if relief is not None:
        nx, ny = nx / nz, ny / nz
        nx[:, 1:-1] += 0.5 * (relief[:, :-2] - relief[:, 2:])
        ny[1:-1] += 0.5 * (relief[:-2] - relief[2:])
        nz = np.ones_like(nx)
    lx, ly, lz = view.lamp
    cosine = (nx * lx + ny * ly + nz * lz) / np.sqrt(nx * nx + ny * ny + nz * nz)
    key = np.maximum(cosine * 0.8 + 0.2, 0)
    return 0.20 + 0.90 * key * key


# ---------------------------------------------------------------------------------------------- behind and under a face


@cache
def _backdrop() -> Plane:
    """The mottled cloth that hangs behind every sitter, the same on both sides."""
    x, y = _grid()
    return grain(np.abs(x) * 0.024 + 9.4, y * 0.021 + 40) + 0.5 * grain(np.abs(x) * 0.06 + 90, y * 0.05 + 9)


def paint_background(f: Face) -> Canvas:
    x, y = _grid()
    colour = ramp(BACKGROUND, f.background_hue)
    colour = mix(mix(colour, (255, 255, 255), 0.1), (22, 24, 30), 0.75 * (1 - f.background_light))
    cloud = 0.06 * _backdrop()
    glow = bump(x - 50 * f.light_direction, y + 40, 190, 210)
    light = 0.45 + 0.75 * glow - 0.0012 * y + cloud
    return Canvas(np.stack([light * (channel * channel / 65025) for channel in colour]))


def head_distance(f: Face, view: View) -> Plane:
    """Signed distance to the outline of cranium, cheeks and chin."""
    wide = 0.5 * (f.face_width + 1)
    (jx, jy), (cx, cy) = view.forward(0, 22), view.forward(0, 49)
    cranium = ellipse(view.x, view.y + 12, 43 + 5.5 * wide + 4 * abs(view.turn[0]), 54)
    cheeks = ellipse(view.x - 0.55 * jx, view.y - 16 - 0.5 * (jy - 22), 34.5 + 11 * wide, 40 - wide)
    chin = ellipse(view.x - 0.8 * cx, view.y - 47 - 0.8 * (cy - 49), 14 + 13 * wide, 15)
    return smooth_min(smooth_min(cranium, cheeks, 14), chin, 22)


def paint_body(canvas: Canvas, f: Face, view: View, skin: Colour, head: Plane) -> None:
    """Neck, shoulders and a garment, lit from the side and in the shadow of the chin."""
    part = box(144, HEIGHT)
    canvas, head = canvas.crop(part), head[part]
    gx, gy = (plane[part] for plane in _grid())
    x = gx - 0.35 * view.lean
    m = np.abs(x)
    lx = view.lamp[0]
    neck = m - 24.5 - 2.5 * f.face_width - 0.006 * np.maximum(gy - 52, 0) ** 2
    neck_alpha = cover(neck, 1.0) * step(30, 34, gy)
    round_neck = x * (1 / 40)
    shade = 0.62 + 0.5 * lx * round_neck - 0.40 * round_neck * round_neck
    shade = shade * (1 - 0.62 * step(24, -3, head)) - 0.10 * bump(x, gy - 92, 7, 12)
    canvas.paint(skin, neck_alpha, np.maximum(shade, 0.1), warmth=0.9)
    shoulder = 76 + 0.0042 * m * m + 0.05 * m - gy
    collar = ellipse(x, gy - 70, 33, 27)
    cloth = smooth_max(shoulder, -collar, 3)
    colour = mix(ramp(CLOTHES, f.background_hue), (235, 232, 226), 0.25 * (1 - f.background_light))
    folds = 0.10 * noise(0.07 * m + 0.03 * gy + 3) + 0.05 * noise(0.19 * m - 0.05 * gy + 40)
    fabric = 0.72 + 0.0045 * lx * x + folds - 0.25 * step(5, 0, collar) + 0.12 * step(2.2, 1.2, np.abs(collar - 4))
    canvas.darken((150, 130, 130), step(6, -1, cloth) * neck_alpha)
    canvas.paint(colour, cover(cloth), fabric * (1 - 0.35 * step(20, 0, head)))


def paint_ears(canvas: Canvas, f: Face, view: View, skin: Colour) -> Plane:
    """Returns how much of each pixel an ear covers."""
    covered = np.zeros_like(view.x)
    wide = 45.5 + 2.75 * (f.face_width + 1)
    sy, sp = view.turn
    for side, part in ((-1.0, box(75, 165, 0, 89)), (1.0, box(75, 165, 89))):
        half, here = canvas.crop(part), view.crop(part)
        x = side * here.x - wide + 8.5 * side * sy + 5.5 * abs(sy)  # the near ear stays out, the far one goes behind
        y = here.y - 2 + 8 * sp + 0.12 * x
        ear = smooth_min(ellipse(x, y, 6.8, 13), ellipse(x + 2.5, y - 12, 4, 4.5), 5)
        alpha = covered[part] = cover(ear)
        half.paint(skin, alpha, lambert(here) * (0.86 - 0.25 * step(-4, 0, ear)), warmth=0.9)
        half.darken((148, 84, 74), alpha * 0.75 * bump(x - 0.5, y + 1, 4.6, 9.5))
    return covered


# ----------------------------------------------------------------------------------------------------------------- hair


@dataclass(frozen=True, kw_only=True)
class Hair:
    """The head of hair: its silhouette, the opening for the face, and how bright each strand is."""

    alpha: Plane  # cover of the whole mass, behind and in front
    opening: Plane  # signed distance to the hairline, negative on the face
    tone: Plane  # shade of the strands
    sheen: Plane  # 0..1 band of reflected light


def grow_hair(f: Face, view: View) -> Hair:
    sy = view.turn[0]
    long = scalar_step(0.2, 0.6, f.hair_length)
    x, y, row = view.x + 13 * sy, view.y, view.y[:, 89:90]  # rows bend the strands alike from side to side
    a, b = 45.5 + 2.5 * (f.face_width + 1) + 5 * abs(sy) + 8 * long, 57 + 7 * long
    rise, fall = np.minimum(y + 13, 0), np.maximum(y + 13, 0)

    # strands are meridians that leave the parting, run down to the side and then hang
    width = a * np.sqrt(np.maximum(1 - (rise * (1 / b)) ** 2, 0.02))
    part = 26 * f.parting * step(40, -50, y)
    dx = x - part
    label = np.abs(dx) / np.where(dx > 0, width - part, width + part)
    label = label + 0.035 * long * noise(0.045 * row + 7) * np.minimum(fall * 0.05, 1)
    clump = noise(9 * label + (0.6 * noise(0.03 * row + 2) + 11))
    thin = (width * (1 / a)) ** 2  # at the crown the strands are finer than a pixel
    strand = 0.42 * clump + 0.34 * noise(27 * label + (0.012 * row + 5)) + 0.24 * thin * noise(71 * label + 0.02 * row)

    m, away = np.abs(view.u), np.maximum(np.abs(view.u - 26 * f.parting) - 4, 0)
    end = -1 + 122 * max(f.hair_length - 0.14, 0.0) + (1 - long) * 26 * step(45, 54, m)
    tips = step(5, -5, y - end - 6 * long * strand + 0.004 * x * x)
    outer = ellipse(x, rise, a, b) - 0.05 * long * np.minimum(fall, 70)
    outer = outer - (0.3 + 1.9 * long * step(-45, 10, y)) * clump

    swept = -48 + 4 * (1 - long) + 0.004 * m * m + (0.2 + 0.8 * long) * 0.0085 * away * away
    fringe = f.fringe * f.fringe
    line = swept + fringe * (-20 + 0.002 * m * m - swept) + (0.8 + 3.2 * fringe) * strand
    side = 41.5 + 1.5 * f.face_width - long * (2 - 2.5 * noise(0.035 * row + 21)) + 1.5 * strand
    opening = smooth_max(line - view.v, m - side, 6 + 12 * long)

    rho = np.sqrt((x * (1 / a)) ** 2 + ((y + 13) * (1 / b)) ** 2)
    shade = lambert(view, radius=(60.0, 80.0))
    tone = shade * (0.80 + 0.42 * strand) * (1 - 0.3 * step(-7, 1, outer)) * (1 - 0.35 * long * step(7, 0, opening))
    tone = tone * (1 - 0.35 * step(4, 0, np.abs(dx)) * step(-36, -50, y))
    lx = 34 * view.lamp[0]
    band = bump(x - lx, rho - 0.80, 70, 0.24) * step(8, -30, y) + 0.5 * long * bump(np.abs(x) - a + 4, y - 30, 9, 40)
    sheen = band * np.maximum(0.45 + 0.75 * strand, 0) * shade
    return Hair(alpha=cover(outer) * tips, opening=opening, tone=tone, sheen=sheen)


def paint_hair(canvas: Canvas, f: Face, hair: Hair, alpha: Plane, light: float) -> None:
    colour = HAIR[int(f.hair_colour)]
    canvas.paint(colour, alpha, hair.tone * light, warmth=0.3)
    canvas.glow(mix(colour, (255, 240, 225), 0.35), alpha * hair.sheen * (0.55 * light))


# ------------------------------------------------------------------------------------------------------------- features


@dataclass(frozen=True, kw_only=True)
class Mouth:
    """The curves of the lips over the face's (u, v), as signed distances."""

    lips: Plane
    gap: Plane  # negative between the lips
    middle: Plane  # v below the line where the lips meet
    arch: Plane  # 1 in the middle of the mouth, 0 in its corners, negative beyond


def shape_mouth(f: Face, u: Plane, v: Plane) -> Mouth:
    smile, gape = f.mouth_curvature, f.mouth_open
    t = u * (1 / (16.5 + 2.2 * smile))
    arch = 1 - t * t
    middle = v - 36.5 - 1.6 * smile + 6.8 * smile * t * t
    top, bottom = (0.25 + 1.6 * gape) * arch, (0.25 + 9.5 * gape) * arch
    cupid = 0.9 * bump(np.abs(u) - 5, u * 0, 4.5, 1) - 0.5 * bump(u, u * 0, 3.5, 1)
    upper = -middle - top - (4.0 - 0.8 * max(smile, 0.0)) * arch - cupid
    lower = middle - bottom - (5.6 - 0.8 * max(smile, 0.0)) * arch * (0.75 + 0.25 * np.maximum(arch, 0))
    return Mouth(
        lips=np.maximum(upper, lower) * 0.85,
        gap=np.maximum(-middle - top, middle - bottom) * 0.85,
        middle=middle,
        arch=arch,
    )


def groove(x: Plane, y: Plane, start: tuple[float, float], end: tuple[float, float], bow: float, width: float) -> Plane:
    """1 along a bent stroke between two points, 0 at `width` pixels from it; it thins out at both ends."""
    ex, ey = end[0] - start[0], end[1] - start[1]
    square = ex * ex + ey * ey
    length = sqrt(square)
    px, py = x - start[0], y - start[1]
    t = (px * ex + py * ey) * (1 / square)
    across = (px * ey - py * ex) * (1 / length) - bow * 4 * t * (1 - t)
    taper = np.maximum(1 - (2 * t - 1) ** 2, 0)
    return np.maximum(1 - (across * (1 / width)) ** 2, 0) ** 2 * taper


def relief_of(f: Face, view: View, mouth: Mouth) -> Plane:
    """The face's height over the ellipsoid in pixels: brow, eye sockets, nose, cheeks, lips and chin."""
    u, v = view.u, view.v
    m = np.abs(u)
    sy, sp = view.turn
    down = np.clip((v + 12) * (1 / 32), 0, 1)
    nose_u, nose_v = u - 8 * sy * down, v - 6 * sp
    wing = np.abs(nose_u)
    bridge = np.maximum(1 - (nose_u / (5.5 + 4.5 * down)) ** 2, 0) ** 2
    high = (1.8 + 5.6 * down * down) * step(27, 18.5, nose_v) * step(-22, -8, nose_v)
    z = high * bridge + 2.2 * bump(nose_u, nose_v - 17, 8, 8) + 2.3 * bump(wing - 7.6, nose_v - 19, 5, 6)
    z += 1.9 * bump(m - 17, v + 20, 24, 9) - 3.6 * bump(m - 17, v + 7, 17, 13) + 1.9 * bump(m - 20, v + 5, 13, 9)
    z += 2.6 * bump(m - 27, v - 13, 19, 18) - 1.5 * bump(m - 44, v + 22, 18, 18) + 1.2 * bump(m, v + 34, 34, 16)
    z += 2.0 * bump(m, v - 36, 25, 18) - 0.9 * bump(m, v - 28.5, 3.4, 6)
    z += 2.4 * bump(m, v - 57, 16, 11) - 1.7 * bump(m, v - 47.5, 13, 5)
    z += 1.5 * step(2, -2.5, mouth.lips)

    return z - lines_of(f, m, v)


def lines_of(f: Face, m: Plane, v: Plane) -> Plane:
    """The depth in pixels of the fold beside the mouth, which a smile deepens, and of the lines that come with age."""
    smile, old = max(f.mouth_curvature, 0.0), f.age * (0.4 + 0.6 * f.age)
    z = np.zeros_like(m)
    part = box(0, 66)
    upper, x, y = z[part], m[part], v[part]
    for height in (-39.0, -33.5, -28.0):
        upper += 1.1 * old * bump(x, y - height + 1.3 * bump(x - 12, x * 0, 14, 1), 27, 1.9)
    upper += 1.2 * old * groove(x, y, (2.6, -27), (3.6, -17), 0.2, 1.8)
    part = box(36, 106)
    middle, x, y = z[part], m[part], v[part]
    for end in (-11.0, -5.5, 0.0):
        middle += 1.0 * old * groove(x, y, (32, -5 + 0.2 * (end + 5)), (41, end), 0.3, 1.6)
    middle += 1.8 * old * groove(x, y, (10, 3), (29, 5), 3.0, 2.6)
    part = box(68, 162)
    lower, x, y = z[part], m[part], v[part]
    lower += (0.35 + 1.9 * f.age + 0.9 * smile) * groove(x, y, (10, 21), (23.5, 39), -2.5, 3.2)
    lower += 1.5 * old * groove(x, y, (20, 42), (20, 55), -1.5, 2.6)
    lower += 2.4 * old * bump(x - 32, y - 28, 11, 15) - 1.6 * old * bump(x - 27, y - 50, 10, 9)  # hollow cheek, jowl
    return z


def paint_skin(canvas: Canvas, f: Face, view: View, skin: Colour, shade: Plane, alpha: Plane) -> None:
    u, v = view.u, view.v
    m = np.abs(u)
    canvas.paint(skin, alpha, shade, warmth=0.9)
    blush = 0.20 + 0.42 * f.makeup
    canvas.darken((238, 148, 140), alpha * blush * bump(m - 29, v - 15, 18, 15))
    canvas.darken((236, 150, 138), alpha * 0.35 * bump(u - 8 * view.turn[0], v - 18, 12, 9))
    canvas.darken((172, 112, 112), alpha * (0.30 + 0.45 * f.age) * bump(m - 17, v + 3, 17, 11))  # the eye's own shade
    canvas.darken((150, 96, 90), alpha * 0.55 * bump(u - 8 * view.turn[0], v - 25.5, 11, 4.2))  # under the nose
    canvas.darken((150, 100, 96), alpha * 0.3 * bump(u, v - 48, 12, 4))  # under the lip
    lx = view.lamp[0]
    shine = 0.12 * bump(u - 20 * lx, v + 31, 30, 13) + 0.16 * bump(m - 25, v - 7, 13, 8) * (1 + lx * np.sign(u))
    shine += 0.30 * bump(u - 8 * view.turn[0] - 1.5 * lx, v - 14.5, 3.6, 4.6) + 0.10 * bump(u - 2 * lx, v - 57, 10, 6)
    shine += 0.14 * bump(u - 4 * view.turn[0] - 1.2 * lx, v - 2, 2.8, 14)
    canvas.glow(mix(skin, (255, 244, 232), 0.5), alpha * shine * shade)


def paint_nostrils(canvas: Canvas, view: View) -> None:
    sy, sp = view.turn
    u, v = view.u - 7.5 * sy, view.v - 6 * sp
    m = np.abs(u)
    hole = cover(ellipse(m - 4.9, v - 21.2 + 0.12 * m, 2.9, 1.5), 1.4)
    canvas.darken((84, 36, 32), 0.85 * hole)
    canvas.darken((150, 88, 78), 0.55 * groove(m, v, (9.6, 14.0), (9.2, 22.5), -1.9, 2.0))
    canvas.darken((150, 88, 78), 0.5 * groove(m, v, (1.0, 23.2), (8.4, 22.2), 0.8, 1.6))


def paint_eyes(canvas: Canvas, f: Face, view: View, shade: Plane) -> None:
    ex, ey = np.abs(view.u) - 20, view.v + 5
    side = np.sign(view.u)
    t = ex * (1 / 11.4)
    arch = np.maximum(1 - t * t, 0)
    axis = -0.07 * ex
    height = 1.2 + 6.2 * f.eye_open
    upper, lower = axis - height * arch * (1 - 0.12 * t), axis + (1.0 + 2.2 * f.eye_open) * arch * (1 + 0.2 * t)
    beyond = np.abs(ex) - 11.4
    eye = np.maximum(np.maximum((upper - ey) * 0.8, (ey - lower) * 0.85), beyond)
    inside = cover(eye)

    lid = axis - (height + 3.3 * np.sqrt(arch)) * (0.25 + 0.75 * arch)
    shadow = step(1.2, -3.5, lid - ey) * step(-1.0, 1.5, upper - ey) * step(0.5, -1.5, beyond)
    tint = mix((196, 142, 130), (132, 92, 128), f.makeup)
    canvas.darken(tint, shadow * (0.25 + 0.45 * f.makeup))
    canvas.darken((120, 72, 62), 0.6 * step(1.6, 0.2, np.abs(ey - lid)) * step(1.5, -2, beyond))

    white = np.clip(0.62 + 0.38 * shade - 0.5 * step(-3.2, 0.3, (upper - ey)) - 0.25 * t * t, 0, 1)
    canvas.paint((236, 228, 222), inside, white)
    canvas.darken((222, 140, 130), inside * 0.8 * bump(ex + 10.5, ey, 3.2, 3.2))
    r = np.sqrt(ex * ex + (ey + 0.7) ** 2 + 1e-6)
    colour = ramp(IRIS, f.eye_colour)
    fibres = 0.85 + 0.35 * step(-3, 4, ey + 0.7) - 0.55 * step(3.8, 5.4, r) - 0.45 * step(-3.4, 0.4, upper - ey)
    canvas.paint(colour, inside * cover(r - 5.2), fibres)
    canvas.paint((12, 9, 10), inside * cover(r - 2.3), 1.0)
    glint_x, glint_y = ex * side - 2.4 * view.lamp[0], ey + 2.9
    canvas.paint((255, 255, 252), inside * (0.95 * cover(np.sqrt(glint_x**2 + glint_y**2) - 1.35)))
    canvas.glow((120, 120, 124), inside * 0.5 * bump(glint_x + 4.4 * view.lamp[0], glint_y - 4.6, 2.2, 1.8))

    thick = (0.75 + 0.85 * f.makeup) * (0.75 + 0.45 * t)
    lash = np.maximum(np.abs(ey - upper) * 0.85 - thick, beyond - 1.4 - 1.6 * f.makeup)
    canvas.paint((26, 17, 15), 0.9 * cover(lash, 0.9))
    under = np.maximum(np.abs(ey - lower) - 0.25, beyond)
    canvas.darken((96, 58, 52), (0.45 + 0.35 * f.makeup) * cover(under, 1.1))


def paint_brows(canvas: Canvas, f: Face, view: View, shade: Plane) -> None:
    m, v = np.abs(view.u), view.v
    t = (m - 7.5) * (1 / 26)
    spine = -17.5 - 7.5 * t + 9.5 * t * t * t
    half = (0.9 + 2.4 * f.brow_thickness) * (0.55 + 1.5 * t * (1 - t) + 0.25 * (1 - t)) * step(1.08, 0.55, t)
    hairs = noise(1.4 * m + 0.9 * (v - spine) + 30)
    edge = np.maximum(np.abs(v - spine) - half - 0.35 * hairs, np.maximum(-t, t - 1) * 26 - 0.5 * hairs)
    colour = mix(HAIR[int(f.hair_colour)], (38, 26, 22), 0.55)
    canvas.paint(colour, (0.72 + 0.16 * f.brow_thickness) * cover(edge, 1.3), (0.8 + 0.25 * hairs) * shade)


def paint_mouth(canvas: Canvas, f: Face, view: View, skin: Colour, shade: Plane) -> None:
    u, mouth = view.u, shape_mouth(f, view.u, view.v)
    natural = mix(skin, (178, 78, 76), 0.48)
    colour = mix(natural, (176, 16, 48), 0.9 * f.makeup)
    body = shade * np.where(mouth.middle < 0, np.float32(0.80), np.float32(1.02))
    creases = 0.05 * noise(0.9 * np.abs(u) + 17)
    lips = cover(mouth.lips, 1.0)
    canvas.paint(colour, lips, body * (1 + creases), warmth=0.5)
    lower = mouth.middle - (3.0 + 9.5 * f.mouth_open) * np.maximum(mouth.arch, 0)
    gloss = (0.10 + 0.30 * f.makeup) * bump(u - 5 * view.lamp[0], lower, 9, 1.8)
    canvas.glow((255, 226, 220), lips * gloss * shade)
    inside = cover(mouth.gap) * step(0.0, 0.06, mouth.arch)
    canvas.paint((62, 16, 18), inside)
    depth = mouth.middle + (1.6 * f.mouth_open) * mouth.arch
    row = cover(depth - 4.6 * mouth.arch + 0.15 * np.abs(noise(0.30 * np.abs(u) + 3)), 0.9)
    teeth = inside * row * step(0.02, 0.3, mouth.arch)
    canvas.paint((240, 234, 224), teeth, np.clip(0.35 + 0.75 * mouth.arch - 0.25 * step(2.0, 0, depth), 0, 1))
    canvas.paint((170, 76, 78), inside * 0.8 * bump(u, depth - 10.5 * f.mouth_open - 1, 10, 4.5), 0.7)
    corner = bump(np.abs(u) - 16.5 - 2.2 * f.mouth_curvature, mouth.middle, 3.2, 2.6)
    canvas.darken((112, 52, 48), 0.55 * corner)


def paint_beard(canvas: Canvas, f: Face, view: View, mouth: Mouth, shade: Plane, head: Plane) -> None:
    """Moustache, cheeks and chin in one mask; stubble first, then fuller and past the chin."""
    u, v = view.u, view.v
    m = np.abs(u)
    amount = f.beard * f.beard
    fuzz = 0.6 * grain(0.85 * m + 0.25 * v + 60, 0.38 * v - 0.2 * m + 90) + 0.4 * grain(1.3 * m + 20, 0.9 * v + 50)
    cheek = 35 - 0.019 * m * m
    area = step(-7, 7, v - cheek - 2 * fuzz)
    moustache = step(1.2, -2.5, ellipse(m - 6, v - 29.5 - 0.02 * m * m, 13, 4.2))
    mask = np.maximum(area, moustache) * (1 - step(1.5, -1.0, mouth.lips))
    mask = mask * step(0.4 + 9 * amount, -2.0, head + 2 * fuzz * amount) * step(-16, 4, v)
    dense = np.clip(amount * 1.6 * (1 + 0.5 * fuzz), 0, 0.94)
    colour = mix(HAIR[int(f.hair_colour)], (44, 32, 28), 0.2)
    canvas.paint(colour, mask * dense, (0.78 + 0.5 * fuzz) * shade + 0.04)


def paint_glasses(canvas: Canvas, f: Face, view: View, head: Plane) -> None:
    kind = int(f.glasses)
    if kind == 0:
        return
    sy, sp = view.turn
    u, v = view.u - 4 * sy, view.v - 3 * sp
    m = np.abs(u)
    ex, ey = m - 21, v + 3.5
    if kind == 1:
        lens, half = ellipse(ex, ey, 14.5, 13.5), 0.75
    else:
        wide, high = (15.5, 11.0) if kind == 2 else (16.5, 12.5)
        px, py = np.maximum(np.abs(ex) - wide + 5, 0), np.maximum(np.abs(ey) - high + 5, 0)
        lens, half = np.sqrt(px * px + py * py + 1e-6) - 5, 1.35
    bridge = np.maximum(np.abs(v + 7.5 - 0.06 * np.maximum(36 - u * u, 0)) - half, m - 8)
    temple = np.maximum(np.abs(v + 7.5 + 0.04 * (m - 36)) - half - 0.2, np.maximum(34.5 - m, head + 0.5))
    frame = np.minimum(np.minimum(np.abs(lens) - half, np.maximum(bridge, -lens)), temple)
    canvas.darken((120, 84, 76), 0.4 * step(2.8, -1.2, np.minimum(np.abs(lens) - half, bridge)))
    inside = cover(lens)
    if kind == 3:
        canvas.paint((30, 26, 30), 0.93 * inside, 0.75 + 0.06 * ey)
    streak = step(2.5, 0, np.abs(u + 0.8 * v - 14 * view.lamp[0]) - 3.5) + step(1.5, 0, np.abs(u + 0.8 * v - 26) - 1)
    canvas.glow((255, 255, 255), inside * 0.05 * streak)
    colour = ((150, 122, 74), (34, 24, 22), (24, 20, 20))[kind - 1]
    canvas.paint(colour, cover(frame), 1 - 0.1 * np.clip(ey, -6, 6))


# ------------------------------------------------------------------------------------------------------------ the whole


def paint_face(canvas: Canvas, f: Face, view: View, skin: Colour, head: Plane, hairline: Plane) -> None:
    mouth = shape_mouth(f, view.u, view.v)
    shade = lambert(view, relief_of(f, view, mouth))
    shade *= (1 - 0.22 * step(-5, 0.5, head)) * (1 - 0.45 * step(-13, 2, hairline))
    paint_skin(canvas, f, view, skin, shade, cover(head))
    paint_beard(canvas, f, view, mouth, shade, head)
    part = box(74, 154)
    paint_mouth(canvas.crop(part), f, view.crop(part), skin, shade[part])
    part = box(24, 116)
    canvas, view, shade, head = canvas.crop(part), view.crop(part), shade[part], head[part]
    paint_nostrils(canvas, view)
    paint_eyes(canvas, f, view, shade)
    paint_brows(canvas, f, view, shade)
    paint_glasses(canvas, f, view, head)


def draw(f: Face) -> NDArray[np.uint8]:
    """uint8 [218, 178, 3]"""
    view, skin = look(f), ramp(SKIN, f.skin)
    head, hair = head_distance(f, view), grow_hair(f, view)
    canvas = paint_background(f)
    paint_hair(canvas, f, hair, hair.alpha, 0.42)
    paint_body(canvas, f, view, skin, head)
    ears = paint_ears(canvas, f, view, skin)

    middle = int(CENTRE[0] + view.lean)
    part = box(46, 208, middle - 68, middle + 70)
    paint_face(canvas.crop(part), f, view.crop(part), skin, head[part], hair.opening[part])
    tucked = ears * step(-2, 1, head) * (1 - scalar_step(0.2, 0.4, f.hair_length))
    paint_hair(canvas, f, hair, hair.alpha * (1 - cover(hair.opening, 1.2)) * (1 - tucked), 1.0)
    return canvas.pixels()
