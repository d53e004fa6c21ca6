"""Drawn portraits with known factors: a data set without a download, of CelebA's size, and a ground truth.

Every factor is an independent draw, uniform over its range or by the weights of its categories, and a pure function of
(seed, image number): image 7 of seed 0 is the same picture in a set of ten and of a million, bit for bit anywhere.
Only the JPEG files made from it also depend on the JPEG library.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards import manifest
from shards.manifest import ShardError
from shards.sources import Source, Table, drawing

QUALITY = 92
BYTES = 7_100  # of an image, about


@dataclass(frozen=True)
class Factor:
    """One cause of the picture: a number in [low, high), or the index of a category."""

    name: str
    low: float
    high: float
    meaning: str
    categories: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()


def _categorical(name: str, meaning: str, **weights: float) -> Factor:
    return Factor(name, 0, len(weights) - 1, meaning, tuple(weights), tuple(weights.values()))


FACTORS: tuple[Factor, ...] = (
    Factor("yaw", -25, 25, "degrees the head turns to the viewer's right"),
    Factor("pitch", -12, 12, "degrees the head nods down"),
    Factor("roll", -8, 8, "degrees the head tilts clockwise"),
    Factor("face_width", -1, 1, "narrow to broad, with the jaw"),
    Factor("skin", 0, 1, "light to dark"),
    _categorical(
        "hair_colour", "colour of hair, brows and beard", black=0.3, brown=0.3, blond=0.16, red=0.1, grey=0.14
    ),
    Factor("hair_length", 0, 1, "cropped to below the shoulders"),
    Factor("parting", -1, 1, "side of the parting, left to right"),
    Factor("fringe", 0, 1, "bare forehead to hair down to the brows"),
    Factor("brow_thickness", 0, 1, "thin to bushy"),
    Factor("eye_open", 0, 1, "nearly shut to wide open"),
    Factor("eye_colour", 0, 1, "along brown, hazel, green, blue, grey"),
    _categorical("glasses", "spectacles and their frame", none=0.7, round=0.1, square=0.1, dark=0.1),
    Factor("mouth_curvature", -1, 1, "frown to smile"),
    Factor("mouth_open", 0, 1, "shut to wide open"),
    Factor("makeup", 0, 1, "lipstick, blush, lashes and eye shadow"),
    Factor("beard", 0, 1, "clean-shaven over stubble (from about 0.4) to full (from about 0.8)"),
    Factor("age", 0, 1, "smooth to lined"),
    Factor("background_hue", 0, 1, "along terracotta, ochre, green, blue, violet; the garment takes a contrasting hue"),
    Factor("background_light", 0, 1, "dark to bright"),
    Factor("light_direction", -1, 1, "lamp from the left to from the right, at 65 degrees at either end"),
)
_INDEX = {factor.name: i for i, factor in enumerate(FACTORS)}
_HAIR = {name: float(i) for i, name in enumerate(FACTORS[_INDEX["hair_colour"]].categories)}

# attribute -> (factor, low, high): it holds where low <= factor < high. In CelebA's order, with CelebA's names.
THRESHOLDS: dict[str, tuple[str, float, float]] = {
    "Bags_Under_Eyes": ("age", 0.75, inf),
    "Bangs": ("fringe", 0.7, inf),
    "Black_Hair": ("hair_colour", _HAIR["black"], _HAIR["black"] + 1),
    "Blond_Hair": ("hair_colour", _HAIR["blond"], _HAIR["blond"] + 1),
    "Brown_Hair": ("hair_colour", _HAIR["brown"], _HAIR["brown"] + 1),
    "Bushy_Eyebrows": ("brow_thickness", 0.7, inf),
    "Chubby": ("face_width", 0.6, inf),
    "Eyeglasses": ("glasses", 1, inf),
    "Gray_Hair": ("hair_colour", _HAIR["grey"], _HAIR["grey"] + 1),
    "Heavy_Makeup": ("makeup", 0.7, inf),
    "Mouth_Slightly_Open": ("mouth_open", 0.25, inf),
    "Narrow_Eyes": ("eye_open", -inf, 0.25),
    "No_Beard": ("beard", -inf, 0.4),
    "Pale_Skin": ("skin", -inf, 0.15),
    "Smiling": ("mouth_curvature", 0.2, inf),
    "Wearing_Lipstick": ("makeup", 0.45, inf),
    "Young": ("age", -inf, 0.6),
}
ATTRIBUTES: tuple[str, ...] = tuple(THRESHOLDS)


def sample_factors(seed: int, number: int) -> NDArray[np.float32]:
    """float32 [len(FACTORS)] of image `number` of `seed`, both in 0 .. 2**64 - 1."""
    # raw words of a counter-based generator: NumPy promises these bits for ever, unlike those of its distributions
    words = np.random.Philox(key=np.array([seed, number], np.uint64)).random_raw(len(FACTORS))
    return np.array(
        [_value(f, (int(word) >> 11) * 2.0**-53) for f, word in zip(FACTORS, words, strict=True)], np.float32
    )


def _value(factor: Factor, u: float) -> float:
    """The factor's value at the quantile u in [0, 1)."""
    if not factor.categories:
        return factor.low + (factor.high - factor.low) * u
    index = 0
    for weight in factor.weights[:-1]:
        u -= weight
        index += u >= 0
    return index


def draw(factors: NDArray[Any]) -> NDArray[np.uint8]:
    """uint8 [218, 178, 3]: the portrait with these factors [len(FACTORS)]."""
    return drawing.draw(drawing.Face(*(float(value) for value in factors)))


def attributes(factors: NDArray[Any]) -> NDArray[np.uint8]:
    """uint8 [len(ATTRIBUTES)] of 0 and 1: the attributes by THRESHOLDS of factors [len(FACTORS)]."""
    return np.array([low <= factors[_INDEX[name]] < high for name, low, high in THRESHOLDS.values()], np.uint8)


@dataclass(frozen=True, kw_only=True)
class Drawings:
    """Images of a seed, drawn where they are read; `Images`, see there."""

    seed: int
    numbers: list[int]

    @property
    def names(self) -> list[str]:
        return [f"{number:06d}.jpg" for number in self.numbers]

    def part(self, rows: np.ndarray) -> Drawings:
        return Drawings(seed=self.seed, numbers=[self.numbers[i] for i in rows])

    def read(self) -> Iterator[bytes]:
        for number in self.numbers:
            stream = io.BytesIO()
            Image.fromarray(draw(sample_factors(self.seed, number))).save(stream, format="JPEG", quality=QUALITY)
            yield stream.getvalue()

    def crc32s(self) -> Iterable[int]:
        return map(zlib.crc32, self.read())

    def version(self) -> object:
        return [self.seed, self.numbers]


def source(count: int, seed: int) -> Source:
    """Images 1 .. count of a seed: of every ten, eight to train, one valid, one test.

    ShardError for a count outside 1 .. 999999 or a seed outside 0 .. 2**64 - 1.
    """
    for name, value, low, high in (("count", count, 1, 999_999), ("seed", seed, 0, 2**64 - 1)):
        if not low <= value <= high:
            raise ShardError(f"drawn faces: {name}={value} is outside {low} .. {high}")
    numbers = np.arange(1, count + 1)
    values = np.stack([sample_factors(seed, number) for number in numbers.tolist()])
    return Source(
        place="drawn faces",
        images=Drawings(seed=seed, numbers=numbers.tolist()),
        numbers=numbers,
        bytes=np.full(count, BYTES),
        split=np.choose(numbers % 10, [2, *[0] * 8, 1]).astype(np.int8),
        tables={
            "attributes": Table(columns=ATTRIBUTES, values=np.stack([attributes(row) for row in values])),
            "factors": Table(columns=tuple(_INDEX), values=values),
        },
        digests={"generator": "faces", "count": str(count), "seed": str(seed)},
        factors=tuple(
            manifest.Factor(name=factor.name, values=tuple(map(float, range(len(factor.categories)))))
            for factor in FACTORS
        ),
        determined=True,
        drawn=True,
    )
