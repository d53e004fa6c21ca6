"""python -m vaedist.health    exit status 1 if a run of this machine or container writes no rows any more"""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MINUTES = 30.0  # an evaluation or a compilation takes some; and after ten, processes that lost one another have ended


def open_runs() -> set[Path]:
    """The directories of the runs that are being trained here, by processes that this one may look at.

    None before the first step, when images may be fetched and decoded for long, nor on a node without rank 0.
    """
    return {path.parent for path in open_files() if path.name == "metrics.jsonl"}


def open_files() -> Iterator[Path]:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            for descriptor in (process / "fd").iterdir():
                with suppress(FileNotFoundError):  # it is closed by now
                    yield descriptor.readlink()


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vaedist.health", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"without a row that are too many ({MINUTES:g})")
    patience = 60 * parser.parse_args(words).minutes
    silent = {run: time.time() - (run / "metrics.jsonl").stat().st_mtime for run in open_runs()}
    for run, seconds in silent.items():
        print(f"{run}: the last row was written {seconds:.0f} s ago")
    if not silent:
        print("no process here has come to its first step, or has rank 0")
    return int(any(seconds > patience for seconds in silent.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
