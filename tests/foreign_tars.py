"""Tars as others make them, honest and hostile."""

import io
import tarfile
from pathlib import Path

import numpy as np
from tiny_set import photograph

from shards import image

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def picture(number: int, kind: str = "jpg") -> bytes:
    """An image of 31 x 37 pixels, in colour."""
    if kind in ("jpg", "jpeg"):
        return photograph(number)
    pixels = np.random.default_rng(number).integers(0, 256, (37, 31, 3), dtype=np.uint8)
    if kind == "npy":
        return image.to_npy(pixels)
    if kind == "png":
        return image.to_png(pixels)
    stream = io.BytesIO()
    image.Image.fromarray(pixels).save(stream, "WEBP", lossless=True)
    return stream.getvalue()


def write(path: Path, members: list[tuple[str, bytes]], form: str = "ustar") -> Path:
    """A tar of these files."""
    with tarfile.open(path, "w", format=FORMATS[form]) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def write_samples(path: Path, numbers: range, kind: str = "jpg") -> Path:
    """Samples of an image and its class, number modulo 3."""
    members = []
    for number in numbers:
        members += [(f"{number:04d}.{kind}", picture(number, kind)), (f"{number:04d}.cls", b"%d" % (number % 3))]
    return write(path, members)


def header(name: bytes, size: bytes | int = 0, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """One block with a right checksum, whatever it claims."""
    field = size if isinstance(size, bytes) else b"%011o\0" % size
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    block[:100], block[124:136], block[156:157] = name.ljust(100, b"\0"), field, kind
    block[157:257] = link.ljust(100, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes, data: bytes = b"", **claims: bytes | int) -> bytes:
    """Header and padded contents."""
    return header(name, **{"size": len(data), **claims}) + data + bytes(-len(data) % 512)


def pax(records: dict[str, str], kind: bytes = b"x") -> bytes:
    text = b""
    for key, value in records.items():
        body = f" {key}={value}\n".encode()
        size = len(body) + len(str(len(body) + len(str(len(body)))))
        text += str(size).encode() + body
    return member(b"./PaxHeaders/x", text, kind=kind)


END = bytes(1024)
