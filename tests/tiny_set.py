"""A packed set of a few small photographs."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from shards.manifest import Manifest
from shards.packing.pack import pack_celeba
from shards.packing.plan import Options

HEIGHT, WIDTH = 37, 31
SMALL = Options(shard_mb=0.03)


def pack_tiny(directory: Path, *, train: int = 23, valid: int = 5, options: Options = SMALL) -> Manifest:
    """Images 1..train + valid of 37x31 pixels, in shards of about five, from a source beside `directory`."""
    source = directory.with_name(f"{directory.name}.source")
    images = source / "img_align_celeba"
    images.mkdir(parents=True)
    names = [f"{image:06d}.jpg" for image in range(1, train + valid + 1)]
    for image, name in enumerate(names, 1):
        (images / name).write_bytes(photograph(image))
    attributes = "".join(f"{name} {1 - 2 * (image % 2)}\n" for image, name in enumerate(names))
    (source / "list_attr_celeba.txt").write_text(f"{len(names)}\nSmiling\n{attributes}")
    partition = "".join(f"{name} {int(image >= train)}\n" for image, name in enumerate(names))
    (source / "list_eval_partition.txt").write_text(partition)
    return pack_celeba(source, directory, options=options, workers=1, quiet=True)


def photograph(image: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """A JPEG with details finer than the pixels it will be scaled to."""
    noise = np.random.default_rng(image).integers(0, 256, (height // 2, width // 2, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def spoil(manifest: Manifest, row: int) -> str:
    """Flips one bit of a training image in its tar; returns how an error should name the place."""
    shard, offset, length, _, image = manifest.array("train", "index")[row].item()
    path = manifest.shard_path("train", shard)
    data = bytearray(path.read_bytes())
    data[offset + length // 2] ^= 16
    path.write_bytes(data)
    return f"{path}: image {image:06d} at byte {offset} is corrupt"
