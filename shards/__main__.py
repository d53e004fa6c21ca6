"""The command line of the data format: python -m shards pack | index | verify | inspect | warm."""

import argparse
import os
import sys
from pathlib import Path

from shards import manifest
from shards.checking import command as verify_command
from shards.checking import inspect
from shards.foreign import command as index_command
from shards.manifest import ShardError
from shards.packing import command as pack_command
from shards.packing.command import directory
from shards.reading import warm


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

    pack_command.add(commands)
    index_command.add(commands)
    verify_command.add(commands)
    show = commands.add_parser("inspect", help="describe a set and draw a grid of samples")
    show.add_argument("dst", type=directory, metavar="DST")
    show.add_argument("--grid", type=Path, metavar="FILE", help="the grid, a PNG (NAME-grid.png in this folder)")
    show.set_defaults(command=_inspect)
    warm.add(commands)
    return parser


def _inspect(options: argparse.Namespace) -> int:
    found = manifest.read(options.dst)
    for line in inspect.report(found):
        print(line)
    # not in the set itself, which holds what its manifest lists and may be read-only
    path: Path = options.grid or Path(f"{options.dst.resolve().name}-grid.png")
    inspect.save_grid(found, path)
    print(f"\n{path}: {', '.join(found.splits)} from top to bottom")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of one image, threads of a library only wait for each other
    sys.exit(main())
