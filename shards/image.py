"""Encoded images: their size without decoding them, their pixels, and the square that a model sees."""

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".npy")
MAX_PIXELS = 2**26  # of one image; a file that claims more is hostile or no image for a VAE
MODES = {"1": 1, "L": 1, "LA": 1, "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "CMYK": 3, "YCbCr": 3}  # Pillow's, of 8 bits
JPEG, PNG, NPY = b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"\x93NUMPY"
STARTS = {JPEG: ".jpg", PNG: ".png", NPY: ".npy"}
JPEG_COLOURS = {"Gray": 1, "YCbCr": 3, "RGB": 3}  # of CMYK the decoders make different colours: Pillow's are taken
PNG_COLOURS = {0: 1, 2: 3, 3: 3, 4: 1, 6: 3}  # colour type -> channels, of which alpha is none
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
PNG_LEVEL = 4  # of compression: level 6 saves a tenth of the bytes for twice the time
# Pillow's errors for what is no image, is cut short, or claims absurd sizes
_PILLOW = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning)


def suffix(data: bytes) -> str:
    """The suffix of a file with these bytes."""
    return next((name for start, name in STARTS.items() if data.startswith(start)), ".webp")


def dimensions(data: bytes) -> tuple[int, int, int]:
    """(height, width, channels) from the header; ValueError says why these bytes are no complete image.

    Only the header is parsed, and the end marker looked for: a bit flipped in between shows on decoding alone.
    channels is 1 for grey and 3 for colour; an alpha channel does not count.
    """
    if data.startswith(NPY):
        height, width, channels = _npy(data).shape
        return height, width, channels
    read = _jpeg_header if data.startswith(JPEG) else _png_header if data.startswith(PNG) else None
    header = read(data) if read and _has_end(data) else None
    return header or _pillow(data, _size)


def decode(data: bytes, channels: int) -> np.ndarray:
    """Pixels, uint8 [height, width, channels]: 1 or 3; ValueError says why the bytes cannot be decoded."""
    pixels = _npy(data) if data.startswith(NPY) else _from_png(data) if data.startswith(PNG) else None
    if pixels is not None:
        return np.broadcast_to(pixels, (*pixels.shape[:2], channels)) if pixels.shape[2] <= channels else _grey(pixels)
    if data.startswith(JPEG) and channels == 3:
        try:
            if _jpeg_header(data):
                return simplejpeg.decode_jpeg(data)  # twice as fast as Pillow, the same bits
        except ValueError:
            pass  # Pillow knows kinds that this decoder does not, and says what is wrong
    return _pillow(data, lambda image: _pixels(image, channels))


def centre(pixels: np.ndarray, crop: int | None) -> np.ndarray:
    """The centre square of uint8 [height, width, channels], `crop` pixels a side or (None) the largest there is.

    ValueError if the image is smaller than that.
    """
    height, width, _ = pixels.shape
    side = min(height, width) if crop is None else crop
    if side > min(height, width):
        raise ValueError(f"{width} x {height} pixels, too small for a crop of {side}")
    top, left = round((height - side) / 2), round((width - side) / 2)  # as torchvision's CenterCrop
    return pixels[top : top + side, left : left + side]


def scale(squares: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Squares, uint8 [side, side, channels] each, of one side or several, as uint8 [n, channels, size, size].

    Bilinear with antialiasing, in integers: the same bits on every machine and in any company.
    """
    if len({square.shape for square in squares}) > 1:
        return np.concatenate([scale([square], size) for square in squares])
    images = np.stack(squares)
    if images.shape[1] == size:
        return images.transpose(0, 3, 1, 2)
    import torch  # seconds, which those who scale nothing do not pay

    with torch.no_grad():
        planes = torch.from_numpy(images).permute(0, 3, 1, 2)
        return torch.nn.functional.interpolate(planes, size=(size, size), mode="bilinear", antialias=True).numpy()


def to_png(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 [height, width, 1 or 3]; of bool [height, width], one bit a pixel.

    Five times as fast as Pillow's encoder, for about the same bytes.
    """
    height, width = pixels.shape[:2]
    binary = pixels.dtype == bool
    rows = np.packbits(pixels, axis=1) if binary else pixels.reshape(height, -1)
    lines = np.empty((height, 1 + rows.shape[1]), np.uint8)
    lines[:, 1:] = rows
    lines[:, 0] = not binary  # filter: the difference to the pixel on the left helps, unless a byte holds eight
    if not binary:
        channels = pixels.shape[2]
        lines[:, 1 + channels :] -= rows[:, :-channels]
    header = struct.pack(
        ">IIBBBBB", width, height, 1 if binary else 8, 0 if rows.size <= height * width else 2, 0, 0, 0
    )
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.data, PNG_LEVEL)), (b"IEND", b""))
    return PNG + b"".join(
        len(data).to_bytes(4) + kind + data + zlib.crc32(data, zlib.crc32(kind)).to_bytes(4) for kind, data in chunks
    )


def _from_png(data: bytes) -> np.ndarray | None:
    """uint8 [height, width, channels] of what `to_png` wrote, twice as fast as Pillow; None if it is another PNG."""
    size = int.from_bytes(data[33:37])
    whole = data[8:16] == b"\0\0\0\rIHDR" and data[37:41] == b"IDAT" and data[45 + size :] == PNG_END
    if not whole or not _png_header(data):
        return None
    width, height, *kind = struct.unpack(">IIBBBBB", data[16:29])
    channels = {(1, 0, 0, 0, 0): 1, (8, 0, 0, 0, 0): 1, (8, 2, 0, 0, 0): 3}.get(tuple(kind))
    if channels is None or zlib.crc32(data[37 : 41 + size]) != int.from_bytes(data[41 + size : 45 + size]):
        return None
    row = (width * channels * kind[0] + 7) // 8
    try:
        found = zlib.decompressobj().decompress(data[41 : 41 + size], height * (1 + row) + 1)
    except zlib.error:
        return None
    if len(found) != height * (1 + row):
        return None
    lines = np.frombuffer(found, np.uint8).reshape(height, 1 + row)
    if (lines[:, 0] != (kind[0] != 1)).any():  # another filter
        return None
    if kind[0] == 1:
        return (255 * np.unpackbits(lines[:, 1:], axis=1, count=width))[..., None]
    return lines[:, 1:].reshape(height, width, channels).cumsum(1, dtype=np.uint8)


def to_npy(pixels: np.ndarray) -> bytes:
    """An .npy file of an array of plain numbers."""
    stream = io.BytesIO()
    np.save(stream, pixels, allow_pickle=False)
    return stream.getvalue()


def _npy(data: bytes) -> np.ndarray:
    """uint8 [height, width, channels] of an .npy file, without a copy; never more memory than the file itself."""
    stream = io.BytesIO(data)
    try:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read[np.lib.format.read_magic(stream)](stream)
    except (ValueError, KeyError):
        raise ValueError("a damaged npy file") from None
    if dtype != np.uint8 or fortran or len(shape) not in (2, 3) or (*shape, 1)[2] not in (1, 3):
        raise ValueError(f"an npy array {dtype} {list(shape)}, not uint8 [height, width, 1 or 3]")
    if len(data) - stream.tell() != int(np.prod(shape, dtype=object)) or 0 in shape:
        raise ValueError(f"an npy array {list(shape)} in a file of {len(data)} bytes")
    return np.frombuffer(data, np.uint8, offset=stream.tell()).reshape(*(*shape, 1)[:3])


def _jpeg_header(data: bytes) -> tuple[int, int, int] | None:
    """As `dimensions`, at ten times the speed of Pillow, which should say what is wrong where this is None."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    known = colours in JPEG_COLOURS and height * width <= MAX_PIXELS
    return (height, width, JPEG_COLOURS[colours]) if known else None


def _png_header(data: bytes) -> tuple[int, int, int] | None:
    """The same for PNG."""
    if len(data) < 33 or zlib.crc32(data[12:29]) != int.from_bytes(data[29:33]):
        return None
    width, height, depth, colours = struct.unpack(">IIBB", data[16:26])
    known = colours in PNG_COLOURS and depth <= 8 and 0 < height * width <= MAX_PIXELS
    return (height, width, PNG_COLOURS[colours]) if known else None


def _pillow(data: bytes, read: Callable[[Image.Image], Any]) -> Any:
    """read(image) of what Pillow makes of these bytes; ValueError if that is nothing good."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            if image.mode not in MODES:
                raise ValueError(f"of mode {image.mode}, not of 8 bits a channel")
            if not _has_end(data):
                image.load()  # padded or cut short: only a decoder can tell
            return read(image)
    except _PILLOW as error:
        raise ValueError(_reason(data, error)) from None


def _size(image: Image.Image) -> tuple[int, int, int]:
    return image.height, image.width, MODES[image.mode]


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _grey(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def _has_end(data: bytes) -> bool:
    if data.startswith(JPEG):
        return data.endswith(b"\xff\xd9")
    if data.startswith(PNG):
        return data.endswith(PNG_END[4:])
    return int.from_bytes(data[4:8], "little") + 8 == len(data)  # RIFF


def _reason(data: bytes, error: Exception) -> str:
    if not data:
        return "an empty file"
    known = data.startswith((JPEG, PNG)) or (data.startswith(b"RIFF") and data[8:12] == b"WEBP")
    if not known:
        return "not an image (jpg, png, webp or npy)"
    if type(error) is ValueError:  # ours
        return str(error)
    kind = "JPEG" if data.startswith(JPEG) else "PNG" if data.startswith(PNG) else "WebP"
    return f"a damaged {kind} ({' '.join(str(error).split())})" if _has_end(data) else f"a truncated {kind}"
