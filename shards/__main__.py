"""The command line of the data format: python -m shards pack | index | verify | inspect."""

import argparse
import sys
from pathlib import Path

from shards import index, inspect, manifest, pack, repair, verify
from shards.manifest import ShardError
from shards.plan import Options

INDEX = """
Scans tars once and writes a manifest, an index and the labels into DST, so that `vaedist` trains on DST. Tars that lie
in DST itself are kept by name; of others the absolute path or the URL, and they must stay where they are. Labels
come from .cls members (numbers below 1000) or from .json members in the form of this program. Without --valid, one
of twenty samples is for validation.
"""

VERIFY = """
Checks size and sha256 of every file. With --repair, damaged and missing files are made again first, and must become
what the manifest describes, byte for byte, or else stay as they are: tars from the folder or zip that was packed
(--from SRC), from a copy of the set (--from URL, or its folder), or without --from where they are drawn or have a URL
of their own; arrays from the tars. A damaged manifest.json can only come from a copy.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status. What its user can mend is one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.command(options)
        return status
    except ShardError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    except KeyboardInterrupt:
        print("shards: interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    print(f"shards: {message}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shards", description="Image data sets as WebDataset shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    packer = commands.add_parser("pack", help="make a set").add_subparsers(required=True, metavar="SOURCE")
    celeba = packer.add_parser("celeba", help="CelebA from its zip or folder and its annotation files")
    celeba.add_argument("src", type=Path, metavar="SRC", help="folder that holds, at any depth, images and annotations")
    celeba.set_defaults(command=_pack_celeba)
    faces = packer.add_parser("faces", help="drawn faces with known factors of variation")
    faces.set_defaults(command=_pack_faces)
    for command in (celeba, faces):
        command.add_argument("dst", type=Path, metavar="DST", help="directory of the set; new or empty")
        command.add_argument("--shard-mb", type=float, default=64, metavar="MB", help="size of a shard, about (64)")
        command.add_argument("--workers", type=_positive, metavar="N", help="processes (one a core)")
    faces.add_argument("--count", type=_positive, required=True, metavar="N", help="number of faces")
    faces.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other faces (0)")

    foreign = commands.add_parser("index", help="make the WebDataset tars of somebody else a set", description=INDEX)
    foreign.add_argument("tars", nargs="+", metavar="TAR_OR_URL", help="for training; braces as in {000..012} expand")
    foreign.add_argument("--to", dest="dst", type=Path, required=True, metavar="DST", help="directory of the set")
    foreign.add_argument("--valid", nargs="+", default=[], metavar="TAR_OR_URL", help="for validation")
    foreign.add_argument("--image", metavar="EXT", help="which member is the image, where samples have several")
    foreign.add_argument("--workers", type=_positive, metavar="N", help="processes (as many as are worth their start)")
    foreign.set_defaults(command=_index)

    check = commands.add_parser("verify", help="check a set; the exit status is 1 if it has faults", description=VERIFY)
    check.add_argument("dst", type=Path, metavar="DST")
    check.add_argument("--deep", action="store_true", help="also decode every sample and compare it with the arrays")
    check.add_argument("--stock", action="store_true", help="also read everything with the webdataset package")
    check.add_argument("--repair", action="store_true", help="first make damaged and missing files again")
    check.add_argument("--from", dest="src", metavar="SRC_OR_URL", help="what it was packed from, or a copy of the set")
    check.set_defaults(command=_verify)

    show = commands.add_parser("inspect", help="describe a set and draw a grid of samples")
    show.add_argument("dst", type=Path, metavar="DST")
    show.add_argument("--grid", type=Path, metavar="FILE", help="the grid, a PNG (NAME-grid.png in this folder)")
    show.set_defaults(command=_inspect)
    return parser


def _pack_celeba(options: argparse.Namespace) -> int:
    pack.pack_celeba(options.src, options.dst, options=Options(shard_mb=options.shard_mb), workers=options.workers)
    return 0


def _pack_faces(options: argparse.Namespace) -> int:
    pack.pack_faces(
        options.dst,
        count=options.count,
        seed=options.seed,
        options=Options(shard_mb=options.shard_mb),
        workers=options.workers,
    )
    return 0


def _index(options: argparse.Namespace) -> int:
    index.index(options.tars, options.dst, valid=options.valid, image=options.image, workers=options.workers)
    return 0


def _verify(options: argparse.Namespace) -> int:
    if options.src is not None and not options.repair:
        raise ShardError("--from says what --repair takes the files from; give both or none")
    if options.repair:
        for fault in repair.repair(options.dst, options.src).values():
            print(f"{fault}: made again")
    faults = verify.verify(options.dst, deep=options.deep, stock=options.stock)
    for fault in faults:
        print(fault)
    if faults:
        print(f"shards: {options.dst}: {len(faults)} faults found; {manifest.REMEDY}", file=sys.stderr)
        return 1
    found = manifest.read(options.dst)
    images = sum(split.count for split in found.splits.values())
    how = f"{' and decode' if options.deep else ''}{', also to stock webdataset' if options.stock else ''}"
    print(f"{options.dst}: {images:,} images are sound{how}, manifest {found.digest}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    found = manifest.read(options.dst)
    for line in inspect.report(found):
        print(line)
    # not in the set itself, which holds what its manifest lists and may be read-only
    path: Path = options.grid or Path(f"{options.dst.resolve().name}-grid.png")
    inspect.save_grid(found, path)
    print(f"\n{path}: {', '.join(found.splits)} from top to bottom")
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
