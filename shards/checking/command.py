"""The command line of `verify`."""

import argparse
import sys
from typing import Any

from shards import manifest
from shards.checking import repair, verify
from shards.manifest import ShardError
from shards.packing.command import directory, positive

DESCRIPTION = """
Checks size and sha256 of every file. With --repair, damaged and missing files are made again first, and must become
what the manifest describes, byte for byte, or else stay as they are: tars from the folder or zip that was packed
(--from SRC), from a copy of the set (--from URL, or its folder), or without --from where they are drawn or have a URL
of their own; arrays from the tars. A damaged manifest.json can only come from a copy.
"""


def add(commands: Any) -> None:
    """Adds `verify` to the commands of a parser."""
    text = "check a set; the exit status is 1 if it has faults"
    parser = commands.add_parser("verify", help=text, description=DESCRIPTION)
    parser.add_argument("dst", type=directory, metavar="DST")
    parser.add_argument("--deep", action="store_true", help="also decode every sample and compare it with the arrays")
    parser.add_argument("--stock", action="store_true", help="also read everything with the webdataset package")
    parser.add_argument("--repair", action="store_true", help="first make damaged and missing files again")
    parser.add_argument(
        "--from", dest="src", metavar="SRC_OR_URL", help="what it was packed from, or a copy of the set"
    )
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (as many as are worth their start)")
    parser.set_defaults(command=_verify)


def _verify(options: argparse.Namespace) -> int:
    if options.src is not None and not options.repair:
        raise ShardError("--from says what --repair takes the files from; give both or none")
    if options.repair:
        for fault in repair.repair(options.dst, options.src, workers=options.workers).values():
            print(f"{fault}: made again")
    faults = verify.verify(options.dst, deep=options.deep, stock=options.stock, workers=options.workers)
    for fault in faults:
        print(fault)
    if faults:
        number = "1 fault" if len(faults) == 1 else f"{len(faults):,} faults"
        print(f"shards: {options.dst}: {number} found; {manifest.REMEDY}", file=sys.stderr)
        return 1
    found = manifest.read(options.dst)
    images = sum(split.count for split in found.splits.values())
    how = f"{' and decode' if options.deep else ''}{', also to stock webdataset' if options.stock else ''}"
    print(f"{options.dst}: {images:,} images are sound{how}, manifest {found.digest}")
    return 0
