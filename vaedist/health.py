"""python -m vaedist.health    exit status 1 if a run of this machine or container writes no rows any more"""

import argparse
import os
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
    """Those that some process writes; `tail -f` does not."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            for descriptor in (process / "fd").iterdir():
                with suppress(FileNotFoundError):  # it is closed by now
                    flags = (process / "fdinfo" / descriptor.name).read_text().partition("flags:")[2].split()[0]
                    if int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
                        yield descriptor.readlink()


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vaedist.health", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"without a row that are too many ({MINUTES:g})")
    patience = 60 * parser.parse_args(words).minutes
    silent = {}
    for run in open_runs():
        with suppress(OSError):  # of a container that this one does not see into
            silent[run] = time.time() - (run / "metrics.jsonl").stat().st_mtime
            print(f"{run}: the last row was written {silent[run]:.0f} s ago")
    if not silent:
        print("no process here has come to its first step, or has rank 0")
    return int(any(seconds > patience for seconds in silent.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
