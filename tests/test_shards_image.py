"""Encoded images: sizes and channels from their headers as from their pixels, and what is no image."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from shards import image

HEIGHT, WIDTH = 30, 20
MODES = {
    "jpg": ("L", "RGB", "CMYK", "YCbCr"),
    "png": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "webp": ("RGB", "RGBA"),
}


def encoded(kind, mode, **options):
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, "jpeg" if kind == "jpg" else kind, **options)
    return stream.getvalue()


KINDS = [
    pytest.param(encoded(kind, mode), f".{kind}", 1 if mode in ("1", "L", "LA") else 3, id=f"{kind}-{mode}")
    for kind, modes in MODES.items()
    for mode in modes
]
ARRAY = image.to_npy(np.zeros((HEIGHT, WIDTH, 3), np.uint8))


@pytest.mark.parametrize(
    ("data", "suffix", "channels"),
    [
        *KINDS,
        pytest.param(encoded("jpg", "RGB", progressive=True), ".jpg", 3, id="progressive"),
        pytest.param(ARRAY, ".npy", 3, id="npy"),
        pytest.param(image.to_npy(np.zeros((HEIGHT, WIDTH), np.uint8)), ".npy", 1, id="npy-grey"),
    ],
)
def test_kind_size_and_channels_are_known_without_decoding(data, suffix, channels):
    assert image.suffix(data) == suffix
    assert image.dimensions(data) == (HEIGHT, WIDTH, channels)
    for wanted in (1, 3):
        pixels = image.decode(data, wanted)
        assert (pixels.shape, pixels.dtype) == ((HEIGHT, WIDTH, wanted), np.uint8)
    if suffix in (".png", ".jpg") and channels == 3:
        with Image.open(io.BytesIO(data)) as read:
            assert np.array_equal(image.decode(data, 3), np.asarray(read.convert("RGB")))


@pytest.mark.parametrize(("data", "suffix", "channels"), KINDS)
def test_an_image_that_is_cut_short_is_called_so(data, suffix, channels):
    kind = {".jpg": "JPEG", ".png": "PNG", ".webp": "WebP"}[suffix]
    for length in (len(data) // 2, 40):
        with pytest.raises(ValueError, match=f"^a (truncated|damaged) {kind}"):
            image.dimensions(data[:length])


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_our_own_pngs_are_read_as_pillow_reads_them(channels):
    numbers = np.random.default_rng(0)
    for size in ((64, 64), (13, 21), (1, 1)):
        pixels = numbers.integers(0, 256, (*size, channels), np.uint8) if channels else numbers.random(size) < 0.3
        data = image.to_png(pixels)
        assert image._from_png(data) is not None
        for wanted, mode in ((1, "L"), (3, "RGB")):
            expected = np.asarray(Image.open(io.BytesIO(data)).convert(mode)).reshape(*size, wanted)
            assert np.array_equal(image.decode(data, wanted), expected)
        assert all(image._from_png(data[:end]) is None for end in range(len(data)))
        if len(data) < 500:
            assert all(image._from_png(flipped(data, place)) is None for place in range(8, len(data)))


def png(width, height, depth, colours):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0)
    return image.PNG + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "an empty file"),
        (b"GIF89a" + bytes(50), r"not an image \(jpg, png, webp or npy\)"),
        (b"\xff\xd8\xff\xd9", "a damaged JPEG"),
        (flipped(encoded("png", "RGB"), 18), "a damaged PNG"),
        (png(10**5, 10**5, 8, 2), r"100000 x 100000 pixels, more than 67,108,864|a damaged PNG"),
        (png(4, 4, 16, 0), "of mode I;16, not of 8 bits a channel"),
        (png(0, 4, 8, 0), "a damaged PNG"),
        (image.to_npy(np.zeros((2, 2), np.float32)), r"an npy array float32 \[2, 2\], not uint8"),
        (image.to_npy(np.zeros((2, 2, 4), np.uint8)), r"an npy array uint8 \[2, 2, 4\], not uint8"),
        (ARRAY[:-1], r"an npy array \[30, 20, 3\] in a file of 1927 bytes"),
        (ARRAY[:20], "a damaged npy file"),
    ],
)
def test_what_is_no_image_is_said_in_one_line(data, words):
    with pytest.raises(ValueError, match=words) as caught:
        image.dimensions(data)
    assert "\n" not in str(caught.value)
