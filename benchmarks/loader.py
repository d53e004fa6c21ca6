"""How many images per CPU-second reach a training step, as ratios to torchvision's way: Pillow from files, as floats.

    ./run python benchmarks/loader.py [SHARDS]      a packed set of JPEGs; without one, 2,000 faces are drawn and packed

All candidates take turns in one process on one thread; a number is the median of their turns. CPU time is that of the
process, its threads and its workers. With a GPU also the copies to it, in GB/s, and a FactorVAE's waits for data.
"""

import argparse
import io
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from shards.packing import pack
from shards.packing.plan import Options, plan
from shards.reading.decoded import decoded
from shards.reading.library import Library
from shards.reading.reader import Reader
from shards.sources.folder import read as read_folder
from vaedist.data.order import FullOrder
from vaedist.data.store import DeviceStore, HostStore, Store, TarStore
from vaedist.data.stream import Batch, Stream

TURNS, SECONDS, BATCH = 5, 0.4, 256
CROP, SIZES = 148, (64, 128)
BASELINE = "Pillow from files, floats (torchvision)"
STREAM, GATHER, TAR = "stream from the host store", "numpy gather", "tar store"


class Rows(Dataset[torch.Tensor]):
    """A memory map as a stock data set."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(self.pixels[i].copy())


def cpu_seconds() -> float:
    """Of this process and the workers it has."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(used.user + used.system for used in times)


def measure(candidates: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Images per CPU-second; a call of a candidate handles BATCH images."""
    turns: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(TURNS):
        for name, call in candidates.items():
            call()
            calls, start, cpu = 0, time.perf_counter(), cpu_seconds()
            while time.perf_counter() - start < SECONDS:
                call()
                calls += 1
            turns[name].append(calls * BATCH / max(cpu_seconds() - cpu, 0.01))  # the clock ticks in hundredths
    return {name: statistics.median(values) for name, values in turns.items()}


def extract(library: Library, folder: Path) -> list[Path]:
    """The training images as files."""
    folder.mkdir()
    paths = []
    for shard, offset, length, _, image in library.manifest.array("train", "index").tolist():
        with library.path("train", shard).open("rb") as tar:
            tar.seek(offset)
            paths.append(folder / f"{image:06d}.jpg")
            paths[-1].write_bytes(tar.read(length))
    return paths


def repacked(paths: list[Path], dst: Path, npy: int | None) -> Library:
    """These files as a set of training images alone."""
    source = read_folder(paths[0].parent, classes=False, valid=0)
    pack.pack(plan(dst.name, source, Options(npy=npy, crop=CROP if npy else None)), dst, workers=1, quiet=True)
    return Library(str(dst), dst.parent)


def stock(library: Library, read: Callable[[dict[str, bytes]], object]) -> Callable[[], object]:
    """BATCH samples a call, as the webdataset package reads them, again and again."""
    tars = [str(library.path("train", number)) for number in range(len(library.manifest.split("train").shards))]
    passes = (webdataset.WebDataset(tars, shardshuffle=False) for _ in itertools.count())
    samples = map(read, itertools.chain.from_iterable(passes))
    return lambda: list(itertools.islice(samples, BATCH))


def batches(store: Store, device: torch.device, batch: int = BATCH) -> Generator[Batch, None, None]:
    order = FullOrder(store.count, seed=0)
    return Stream(store, [order], lambda seen: np.arange(seen, seen + batch)[None], batch, device).batches(0)


def compare(library: Library, paths: list[Path], folder: Path, size: int) -> None:
    """Prints the table of one size."""
    reader = Reader(library, "train", size=size, crop=CROP, threads=1)
    images = decoded(reader, folder / "cache", print)
    images.warm()
    host, tar, draws = HostStore(images), TarStore(reader), np.random.default_rng(0)
    style = transforms.Compose([transforms.CenterCrop(CROP), transforms.Resize(size), transforms.ToTensor()])
    npy, rows = repacked(paths, folder / f"npy{size}", size), Rows(images.pixels)
    endless = RandomSampler(rows, replacement=True, num_samples=10**9)
    workers = iter(DataLoader(rows, BATCH, sampler=endless, num_workers=2))
    streamed = batches(host, torch.device("cpu"))
    files, out, source = (
        itertools.cycle(paths),
        np.empty((BATCH, *reader.shape), np.uint8),
        images.pixels[:BATCH].copy(),
    )

    def ids() -> np.ndarray:
        return draws.integers(0, reader.count, BATCH)

    def some() -> list[Image.Image]:
        return [Image.open(path) for path in itertools.islice(files, BATCH)]

    def cut(image: Image.Image) -> np.ndarray:
        left, top = (image.width - CROP) // 2, (image.height - CROP) // 2
        square = image.crop((left, top, left + CROP, top + CROP))
        return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))

    speeds = measure(
        {
            BASELINE: lambda: torch.stack([style(image) for image in some()]),
            "Pillow from files, bytes": lambda: [cut(image) for image in some()],
            "webdataset, JPEG, floats": stock(library, lambda sample: style(Image.open(io.BytesIO(sample["jpg"])))),
            "webdataset, npy": stock(npy, lambda sample: np.load(io.BytesIO(sample["npy"]))),
            "DataLoader, 2 workers, memory map": lambda: next(workers),
            TAR: lambda: tar.gather(ids()),
            STREAM: lambda: next(streamed),
            "host store": lambda: host.gather(ids()),
            GATHER: lambda: np.take(images.pixels, ids(), axis=0, out=out),
            "memcpy": lambda: np.copyto(out, source),
        }
    )
    streamed.close()
    print(f"\n{size} x {size} pixels {'images/CPU-s':>34}{'x baseline':>12}{'x numpy gather':>16}")
    for name, speed in speeds.items():
        print(f"{name:40}{speed:12,.0f}{speed / speeds[BASELINE]:12.2f}{speed / speeds[GATHER]:16.3f}")


def packing(paths: list[Path], folder: Path) -> None:
    """Prints how fast files are packed as they are, in one process."""
    speeds = []
    for turn in range(TURNS):
        cpu = cpu_seconds()
        repacked(paths, folder / f"packed{turn}", None)
        speeds.append(len(paths) / (cpu_seconds() - cpu))
    print(f"\n{'packing as they are':40}{statistics.median(speeds):12,.0f} images/CPU-s")


def on_gpu(library: Library, folder: Path) -> None:
    """Prints how fast images come to the GPU, and the share of a FactorVAE's time that is spent waiting for them."""
    gpu = torch.device("cuda")
    images = decoded(Reader(library, "train", size=64, crop=CROP, threads=1), folder / "cache", print)
    for name, store in (("device store", DeviceStore(images, gpu)), ("pinned host store", HostStore(images))):
        streamed, count = batches(store, gpu, 4096), 200
        for _ in range(10):
            next(streamed)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            next(streamed)
        torch.cuda.synchronize()
        moved = count * 4096 * int(np.prod(store.shape))
        print(f"{name:40}{moved / (time.perf_counter() - start) / 1e9:12.2f} GB/s")
        streamed.close()
    for kind in ("device", "host"):
        run = folder / kind
        words = ("recipe=factorvae", f"data.shards={library.location}", f"data.cache={folder / 'cache'}", f"run={run}")
        short = ("train.steps=2000", "track.every=1000", "track.wandb=off", "evaluate.names=[]", f"data.store={kind}")
        train = Path(__file__).parents[1] / "vaedist" / "train.py"
        subprocess.run([sys.executable, str(train), *words, *short], check=True)
        row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        print(f"factorvae from the {kind} store{'':15}{row['perf/images_per_s']:12,.0f} images/s", end="")
        print(f", waiting {row['perf/data_wait']:.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="?", type=Path)
    given = parser.parse_args().shards
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = given or pack.pack_faces(folder / "faces", count=2000).directory
        library = Library(str(shards), folder)
        paths = extract(library, folder / "files")
        for size in SIZES:
            compare(library, paths, folder, size)
        packing(paths, folder)
        if torch.cuda.is_available():
            on_gpu(library, folder)


if __name__ == "__main__":
    main()
