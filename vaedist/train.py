"""accelerate launch vaedist/train.py recipe=NAME [key.path=value ...]    the same command again resumes the run"""

import os
import sys
import time
from pathlib import Path

if not __package__:  # run as a file: its own directory comes first on the path, where the package's parent belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])
PATIENCE = 30.0  # seconds for rank 0 to say what is wrong with all
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's C++ warnings speak to its developers
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # and so does its profiler


def main(words: list[str]) -> int:
    """The exit status: 0 when the run is complete, 1 after one line on stderr saying what is wrong."""
    from shards.manifest import ShardError
    from vaedist.backend import Backend
    from vaedist.config import dump
    from vaedist.recipe import load
    from vaedist.trainer import USER_ERRORS, ElsewhereError, train

    first = os.environ.get("RANK", "0") == "0"
    try:
        recipe, dry_run = load(words)
        if dry_run:
            if first:
                print(dump(recipe), end="")
            return 0
        backend = Backend(precision=recipe.train.precision, accumulate=recipe.train.accumulate, tf32=recipe.train.tf32)
        train(recipe, backend)
        backend.close()
    except (*USER_ERRORS, ElsewhereError) as error:
        if not (first or isinstance(error, ShardError | OSError)):  # the others are mostly the same on all ranks
            time.sleep(PATIENCE)  # until the launcher ends us: it would end rank 0 before that one has said its line
        if not isinstance(error, ElsewhereError):  # and rank 0 had nothing to say
            print(f"vaedist: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        if first:
            print(
                "vaedist: interrupted; the same command resumes from the last checkpoint", file=sys.stderr, flush=True
            )
        return 130
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if status:
        # The backend is not closed, since closing would wait for ranks that wait for this one. But its threads must not
        # meet the interpreter's end: one that then lets go of a tensor aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
