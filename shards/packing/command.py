"""The command line of `pack`: what is packed, and how."""

import argparse
from pathlib import Path
from typing import Any

from shards.manifest import ShardError
from shards.packing import pack
from shards.packing.plan import WHOLE, Options, Part, plan
from shards.remote.fetch import is_remote
from shards.sources import Source, celeba, faces, folder, ground_truth


def add(commands: Any) -> None:
    """Adds `pack` with its sources to the commands of a parser."""
    sources = commands.add_parser("pack", help="make a set").add_subparsers(required=True, metavar="SOURCE")

    source = sources.add_parser("celeba", help="CelebA from its zip or folder and its annotation files")
    source.add_argument("src", type=Path, metavar="SRC", help="folder that holds, at any depth, images and annotations")
    _add_missing(source, "the annotations name")
    _add_options(source, _celeba)

    source = sources.add_parser(
        "folder",
        help="any tree of images",
        description="Packs every .jpg, .png, .webp and .npy in a folder or below it. The folders train, valid and test "
        "at its top are the splits; else the column `split` of the table; else a tenth is for validation.",
    )
    source.add_argument("src", type=Path, metavar="SRC", help="the folder")
    source.add_argument(
        "--labels",
        type=Path,
        metavar="FILE.csv",
        help="columns: path below SRC or file name, then attributes of 0 and 1; or none (the folders' names)",
    )
    source.add_argument("--valid", type=float, metavar="PERCENT", help="of the training images are for validation (10)")
    _add_missing(source, "the table names")
    _add_options(source, _folder)

    source = sources.add_parser("faces", help="drawn faces with known factors of variation")
    _add_options(source, _faces, pack.FACES)
    source.add_argument("--count", type=positive, required=True, metavar="N", help="number of faces")
    source.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other faces (0)")

    for name, what, option in (("dsprites", "dSprites", "--npz"), ("shapes3d", "3D Shapes", "--h5")):
        source = sources.add_parser(name, help=f"all images of {what}, drawn or from the official file")
        source.add_argument(option, type=Path, metavar="FILE", dest="file", help="the official file (without: drawn)")
        source.set_defaults(name=name)
        _add_options(source, _ground_truth)


def positive(text: str) -> int:
    """A number of things, at least one."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def part(text: str) -> Part:
    """Which part of how many."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text} is no part; of two there are 0/2 and 1/2")
    return Part(int(index), int(count))


def directory(text: str) -> Path:
    """A directory on this machine; a URL would be taken for one of that name."""
    if is_remote(text):
        raise argparse.ArgumentTypeError(f"{text} is a URL; name a directory of this machine")
    return Path(text)


def _add_missing(parser: argparse.ArgumentParser, who: str) -> None:
    parser.add_argument("--allow-missing", action="store_true", help=f"leave out images that {who} and SRC lacks")


def _add_options(parser: argparse.ArgumentParser, read: Any, defaults: Options = pack.DEFAULT) -> None:
    """What all sources have in common; read(arguments) is the name of the set and its source."""
    parser.set_defaults(command=_pack, read=read)
    parser.add_argument("dst", type=directory, metavar="DST", help="directory of the set: new, empty or unfinished")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    size = f"size of a shard, about ({defaults.shard_mb:g})"
    parser.add_argument("--shard-mb", type=float, default=defaults.shard_mb, metavar="MB", help=size)
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="order of the samples (that of the numbers)")
    kinds = "jpg: the images' own bytes, whatever their format (default); npy: decoded squares of --size pixels"
    parser.add_argument("--encoding", choices=("jpg", "npy"), default="jpg", help=kinds)
    parser.add_argument("--size", type=int, metavar="S", help="pixels a side")
    parser.add_argument("--crop", type=int, metavar="C", help="of the centre square that is scaled to them (largest)")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (one a core)")
    which = "pack one of N parts, 0/N to N-1/N, in any order and on any hosts; the last one finishes the set"
    parser.add_argument("--part", type=part, default=WHOLE, metavar="I/N", help=which)


def _pack(arguments: argparse.Namespace) -> int:
    if arguments.encoding == "npy" and arguments.size is None:
        raise ShardError("--encoding npy needs --size, the pixels a side of what is stored")
    if arguments.encoding != "npy" and arguments.size is not None:
        raise ShardError("--size scales images packed with --encoding npy; original bytes are kept whole")
    options = Options(shard_mb=arguments.shard_mb, shuffle=arguments.shuffle, npy=arguments.size, crop=arguments.crop)
    name, source = arguments.read(arguments)
    planned = plan(name, source, options)
    if not arguments.dry_run:
        pack.pack_part(planned, arguments.dst, arguments.part, workers=arguments.workers)
        return 0
    for line in planned.table():
        print(line)
    if arguments.part != WHOLE:
        print(f"part {arguments.part}: {len(planned.shards[arguments.part.slice])} of these shards")
    return 0


def _celeba(arguments: argparse.Namespace) -> tuple[str, Source]:
    return "celeba", celeba.read(arguments.src, allow_missing=arguments.allow_missing)


def _folder(arguments: argparse.Namespace) -> tuple[str, Source]:
    src, dst = arguments.src.resolve(), arguments.dst.resolve()
    if dst.is_relative_to(src):
        raise ShardError(f"{dst}: lies inside {src}, whose files are packed; choose a directory outside of it")
    none = arguments.labels == Path("none")
    labels = None if none else arguments.labels
    if labels is None and arguments.allow_missing:
        raise ShardError("--allow-missing leaves out what --labels FILE.csv names; without a table nothing is missing")
    return src.name, folder.read(
        arguments.src,
        labels=labels,
        classes=not none,
        valid=arguments.valid,
        allow_missing=arguments.allow_missing,
    )


def _ground_truth(arguments: argparse.Namespace) -> tuple[str, Source]:
    return arguments.name, ground_truth.source(arguments.name, file=arguments.file)


def _faces(arguments: argparse.Namespace) -> tuple[str, Source]:
    return "faces", faces.source(arguments.count, arguments.seed)
