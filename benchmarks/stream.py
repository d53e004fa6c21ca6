"""How fast images reach a training step, as ratios to decoding, cropping and scaling JPEG files with Pillow.

    ./run python benchmarks/stream.py [SHARDS]      a packed set; without one, 1000 faces are drawn and packed first

All candidates take turns in one run; a number is the median of their turns.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shards.manifest import Manifest
from shards.pack import pack_faces
from vaedist.data import Config
from vaedist.data.order import Order
from vaedist.data.store import Store
from vaedist.data.stream import Stream

TURNS, SECONDS, BATCH = 7, 0.5, 256
CROP, SIZE = 148, 64
BASELINE = "Pillow from files, one thread"


def extract(manifest: Manifest, count: int, folder: Path) -> list[Path]:
    """The first training images as files."""
    paths = []
    for shard, offset, length, _, image in manifest.array("train", "index")[:count].tolist():
        with manifest.shard_path("train", shard).open("rb") as tar:
            tar.seek(offset)
            paths.append(folder / f"{image:06d}.jpg")
            paths[-1].write_bytes(tar.read(length))
    return paths


def decode(path: Path) -> np.ndarray:
    photo = Image.open(path)
    left, top = (photo.width - CROP) // 2, (photo.height - CROP) // 2
    square = photo.crop((left, top, left + CROP, top + CROP))
    return np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def measure(candidates: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Images per second; a call of a candidate handles BATCH images."""
    turns: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(TURNS):
        for name, call in candidates.items():
            calls, start = 0, time.perf_counter()
            while (seconds := time.perf_counter() - start) < SECONDS:
                call()
                calls += 1
            turns[name].append(calls * BATCH / seconds)
    return {name: statistics.median(values) for name, values in turns.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", type=Path)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = parser.parse_args().shards or pack_faces(folder / "faces", count=1000).directory
        config = Config(shards=shards, crop=CROP, size=SIZE, cache=folder / "cache", store="host")
        host, tar = config.open(print).train, replace(config, store="tar").open(print).train
        files = extract(config.open(print).manifest, BATCH, folder)
        draws = np.random.default_rng(0)

        def gather(store: Store) -> torch.Tensor:
            return store.gather(draws.integers(0, store.count, BATCH))

        def rows(seen: int) -> np.ndarray:
            return np.arange(seen, seen + BATCH)[None]

        batches = Stream(host, [Order(host.count, seed=0)], rows, BATCH, torch.device("cpu")).batches(0)
        speeds = measure(
            {
                BASELINE: lambda: [decode(path) for path in files],
                "tar store": lambda: gather(tar),
                "host store": lambda: gather(host),
                "stream from the host store": lambda: next(batches),
            }
        )
        batches.close()
    for name, speed in speeds.items():
        print(f"{name:32} {speed:12,.0f} images/s {speed / speeds[BASELINE]:8.2f} x")


if __name__ == "__main__":
    main()
