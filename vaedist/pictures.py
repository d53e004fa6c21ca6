"""Pictures with their labels, and their files: grids of images, pixel for pixel, and charts in the same letters."""

import io
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shards.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture = np.ndarray  # uint8 [H, W, 3], or [frames, H, W, 3] of an animation
PAD = 2  # white pixels below and to the right of every image
GAP = 8  # more of them between groups of rows, and around text
LETTERS = 12  # pixels
INK, FAINT = "#222222", "#777777"
COLOURS = ("#3b6ea8", "#d0743c")
FRAME = 120  # milliseconds of an animation's frame
FORMATS = ("png", "gif")  # of pictures and of animations
DPI = 110


def grid(
    tiles: np.ndarray, caption: str, *, rows: Sequence[str] = (), columns: Sequence[str] = (), group: int = 0
) -> Picture:
    """Images under a caption, their rows and columns labelled; after every `group` rows comes a gap.

    tiles: uint8 [rows, columns, H, W, 3], the last one in the picture's lower right corner, each PAD from the next.
    """
    count, across, height, width, _ = tiles.shape
    height, width, font = height + PAD, width + PAD, _font()
    left = max((ceil(font.getlength(label)) + GAP for label in rows), default=0) + PAD
    lines = _wrapped(caption, left + across * width - 2 * PAD)
    line = sum(font.getmetrics())
    top = GAP + line * len(lines) + GAP // 2 + (line if columns else 0) + PAD
    tops = [top + row * height + (row // group * GAP if group else 0) for row in range(count)]
    picture = Image.new("RGB", (left + across * width, tops[-1] + height), "white")
    draw = ImageDraw.Draw(picture)
    for number, text in enumerate(lines):
        draw.text((PAD, GAP // 2 + number * line), text, INK, font)
    for column, label in enumerate(columns):
        draw.text((left + column * width + (width - PAD) / 2, top - PAD), label, FAINT, font, anchor="md")
    for row, label in enumerate(rows):
        draw.text((left - GAP, tops[row] + (height - PAD) / 2), label, FAINT, font, anchor="rm")
    for row in range(count):
        for column in range(across):
            picture.paste(Image.fromarray(tiles[row, column]), (left + column * width, tops[row]))
    return np.asarray(picture)


def there_and_back(frames: Sequence[Picture]) -> Picture:
    """An animation that ends where it began."""
    return np.stack([*frames, *frames[-2:0:-1]])


def number(value: float) -> str:
    """A value as a label: −3, −0.6, 0, 0.125."""
    return f"{round(value, 3) + 0.0:g}".replace("-", "−")  # + 0.0: no minus before a zero


def signed(value: float) -> str:
    """A value that changes from frame to frame, always as wide: −3.0, +0.5."""
    return f"{value:+.1f}".replace("-", "−")


def panels(caption: str, count: int, *, size: tuple[float, float], down: bool = False) -> tuple["Figure", list[Any]]:
    """A figure without pyplot's global state and its axes, below or beside each other; size: inches of each."""
    from matplotlib.figure import Figure  # takes seconds

    shape = (count, 1) if down else (1, count)
    figure = Figure(figsize=(size[0] * shape[1], size[1] * shape[0] + 0.3), dpi=DPI, layout="constrained")
    figure.suptitle(caption, fontsize=9, color=INK, x=0.01, ha="left", parse_math=False)  # a run may have any name
    axes = list(np.ravel(figure.subplots(*shape)))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=FAINT)
        axis.set_axisbelow(True)
        axis.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    return figure, axes


def drawn(figure: "Figure") -> Picture:
    """The pixels of a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def write_pictures(directory: Path, pictures: Mapping[str, Picture]) -> None:
    """NAME.png for each of them, or NAME.gif of an animation."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, pixels in pictures.items():
        with replacing(directory / f"{name}.{FORMATS[pixels.ndim - 3]}") as file:
            file.write(encoded(pixels))


def encoded(pixels: Picture) -> bytes:
    """A picture's file."""
    stream = io.BytesIO()
    if pixels.ndim == 3:
        Image.fromarray(pixels).save(stream, format="PNG")
    else:
        # one palette for all frames: with one of its own each would flicker, and take ten times as long
        palette = Image.fromarray(pixels.reshape(-1, *pixels.shape[2:])).quantize(method=Image.Quantize.FASTOCTREE)
        frames = (Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in pixels)
        first, *others = frames
        first.save(stream, format="GIF", save_all=True, append_images=others, duration=FRAME, loop=0)
    return stream.getvalue()


@cache
def _font() -> ImageFont.FreeTypeFont:
    """That of the charts, which has Greek letters and a minus; found without importing matplotlib."""
    spec = find_spec("matplotlib")
    assert spec is not None
    assert spec.origin is not None
    return ImageFont.truetype(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", LETTERS)


def _wrapped(text: str, width: int) -> list[str]:
    """The lines of a text that is to be so many pixels wide."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _font().getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
