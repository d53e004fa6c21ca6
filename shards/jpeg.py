"""Looking into JPEG bytes: their size without decoding them, and their pixels."""

import io

import numpy as np
from PIL import Image

END = b"\xff\xd9"


def dimensions(data: bytes) -> tuple[int, int]:
    """(height, width) from the header; ValueError says why these bytes are no complete JPEG.

    Only the header is parsed, and the end marker looked for: a bit flipped in between shows on decoding alone.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            if not data.endswith(END):
                image.load()  # padded or cut short: only a decoder can tell
            return image.height, image.width
    except OSError as error:
        raise ValueError(_reason(data, error)) from None


def decode(data: bytes) -> np.ndarray:
    """Pixels, uint8 [height, width, 3]; ValueError says why the bytes cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(_reason(data, error)) from None


def _reason(data: bytes, error: OSError) -> str:
    if not data:
        return "an empty file"
    if not data.startswith(b"\xff\xd8"):
        return "not a JPEG"
    return "a truncated JPEG" if not data.endswith(END) else f"a damaged JPEG ({' '.join(str(error).split())})"
