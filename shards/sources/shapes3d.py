"""A set like 3D Shapes (Kim & Mnih 2018), with its factors in its order, drawn without a download.

The pictures are not the published ones: a like room with like objects, seen by the rays of raycasting.py. Hues only
colour what the rays have found, so that the set has 480 scenes to light; they are kept, 48 KiB each. Light and colours
are whole numbers: an image has the same bytes whatever rows are drawn with it, on however many threads.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.sources import raycasting

SHAPE = (raycasting.SIDE, raycasting.SIDE, 3)
HUES = tuple(i / 10 for i in range(10))
FACTORS: dict[str, tuple[float, ...]] = {  # by its official name and in its official order: a factor's values
    "floor_hue": HUES,
    "wall_hue": HUES,
    "object_hue": HUES,
    "scale": tuple(np.linspace(0.75, 1.25, 8).tolist()),
    "shape": (0.0, 1.0, 2.0, 3.0),  # cube, cylinder, sphere, capsule
    "orientation": tuple(np.linspace(-30, 30, 15).tolist()),  # degrees
}
SIZES = tuple(len(values) for values in FACTORS.values())
COUNT = prod(SIZES)  # images, numbered row-major: the orientation changes fastest

CHUNK = 32  # images painted together: many enough for a call of the library, few enough for a cache
STEPS = 2**14  # of light; colours of 8 bits times light of 14 bits are whole numbers that float32 holds exactly


def factors(rows: NDArray[Any]) -> NDArray[np.float32]:
    """float32 [n, 6]: the factors' values of images `rows` [n]; ValueError for a row outside 0 .. COUNT - 1."""
    classes = np.unravel_index(rows, SIZES)
    return np.stack(
        [np.array(values, np.float32)[i] for values, i in zip(FACTORS.values(), classes, strict=True)], axis=1
    )


def images(rows: NDArray[Any], device: str = "cpu") -> NDArray[np.uint8]:
    """uint8 [n, 64, 64, 3]: images `rows` [n] of the set; ValueError for a row outside 0 .. COUNT - 1.

    Processes of one thread each draw faster than a process of many threads, which wait for each other at every step.
    """
    *hues, scale, shape, orientation = np.unravel_index(rows, SIZES)
    colours = torch.from_numpy(hue_colours()[np.stack(hues, axis=1)]).to(device)  # [n, surface, channel]
    scenes = list(zip(scale.tolist(), shape.tolist(), orientation.tolist(), strict=True))
    out = np.empty((len(scenes), *SHAPE), np.uint8)
    for first in range(0, len(scenes), CHUNK):
        part = slice(first, first + CHUNK)
        light = torch.stack([scene(*classes, device) for classes in scenes[part]])
        out[part] = paint(light, colours[part]).cpu().numpy()
    return out


def hue_colours() -> NDArray[np.float32]:
    """float32 [10, 3]: red, green and blue, 0 .. 255, of the hues at full saturation and value."""
    turn = 6 * np.array(HUES)[:, None]  # red is at 0 and 6, green at 2, blue at 4
    distance = np.abs((turn - (0, 2, 4) + 3) % 6 - 3)
    return np.rint(255 * np.clip(2 - distance, 0, 1)).astype(np.float32)


def paint(light: Tensor, colours: Tensor) -> Tensor:
    """uint8 [n, 64, 64, 3] of light [n, surface, 64, 64] in STEPS and colours [n, surface, channel] in 0 .. 255."""
    light = light.flatten(2)
    tones = light[:, 0, None] * colours[:, 0, :, None]  # [n, channel, pixels]
    for surface in (raycasting.WALLS, raycasting.OBJECT):
        tones.addcmul_(light[:, surface, None], colours[:, surface, :, None])
    tones.add_(STEPS / 2).mul_(1 / STEPS)
    return tones.to(torch.uint8).transpose(1, 2).reshape(-1, *SHAPE)


@cache
def scene(scale: int, shape: int, orientation: int, device: str) -> Tensor:
    """float32 [surface, 64, 64] of class numbers: a surface's light times its share of a pixel, in whole STEPS."""
    size, angle = FACTORS["scale"][scale], FACTORS["orientation"][orientation]
    return torch.round(raycasting.render(shape, size, angle, device) * STEPS)
