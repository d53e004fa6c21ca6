"""Fetching and decoding a set before a job starts, so that a run on this node finds everything ready."""

import argparse
from pathlib import Path
from typing import Any

from shards import parallel
from shards.packing.command import positive
from shards.reading.decoded import decoded
from shards.reading.library import CACHE, Library
from shards.reading.reader import Reader


def add(commands: Any) -> None:
    """Adds `warm` to the commands of a parser."""
    parser = commands.add_parser("warm", help="fetch and decode a set before a job starts", description=__doc__)
    parser.add_argument("location", metavar="DST", help="directory or URL of the set, as in data.shards")
    parser.add_argument("--size", type=positive, default=64, help="pixels a side, as in data.size (64)")
    parser.add_argument("--crop", type=_crop, default=148, help="of the centre square, as in data.crop (148), or null")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="DIR", help=f"as in data.cache ({CACHE})")
    parser.set_defaults(command=_warm)


def _warm(options: argparse.Namespace) -> int:
    library = Library(options.location, options.cache)
    for split in library.manifest.splits:
        reader = Reader(library, split, size=options.size, crop=options.crop, threads=parallel.cores())
        images = decoded(reader, options.cache.expanduser(), print)
        images.warm()
        print(f"{split}: {reader.count:,} images of {options.size} pixels a side are ready in {images.path.parent}")
    library.close()
    return 0


def _crop(text: str) -> int | None:
    return None if text == "null" else positive(text)
