"""The command line of `index`."""

import argparse
from typing import Any

from shards.foreign import index
from shards.packing.command import directory, positive

DESCRIPTION = """
Scans tars once and writes a manifest, an index and the labels into DST, so that `vaedist` trains on DST. Tars that lie
in DST itself are kept by name; of others the absolute path or the URL, and they must stay where they are. Labels
come from .cls members (numbers below 1000) or from .json members in the form of this program. Without --valid, one
of twenty samples is for validation.
"""


def add(commands: Any) -> None:
    """Adds `index` to the commands of a parser."""
    parser = commands.add_parser("index", help="make the WebDataset tars of others a set", description=DESCRIPTION)
    parser.add_argument("tars", nargs="+", metavar="TAR_OR_URL", help="for training; braces as in {000..012} expand")
    parser.add_argument("--to", dest="dst", type=directory, required=True, metavar="DST", help="directory of the set")
    parser.add_argument("--valid", nargs="+", default=[], metavar="TAR_OR_URL", help="for validation")
    parser.add_argument("--image", metavar="EXT", help="which member is the image, where samples have several")
    parser.add_argument("--workers", type=positive, metavar="N", help="processes (as many as are worth their start)")
    parser.set_defaults(command=_index)


def _index(options: argparse.Namespace) -> int:
    index.index(options.tars, options.dst, valid=options.valid, image=options.image, workers=options.workers)
    return 0
