"""accelerate launch vaedist/train.py recipe=NAME [key.path=value ...]    the same command again resumes the run"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a file: its own directory comes first on the path, where the package's parent belongs
    sys.path[0] = str(Path(__file__).resolve().parents[1])
PATIENCE = 30.0  # seconds for rank 0 to say what is wrong with all
if TYPE_CHECKING:
    from vaedist.backend import Backend
    from vaedist.recipe import Recipe
    from vaedist.stop import Stop

    Work = Callable[[Recipe, Backend, Stop], Any]
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's C++ warnings speak to its developers
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # and so does its profiler


def main(words: list[str], work: "Work | None" = None) -> int:
    """Trains, or does other `work` on a run, on every process that the launcher has started.

    The exit status: 0 when the run is complete, 1 after one line on stderr that says what is wrong, 75 (EX_TEMPFAIL)
    when SIGTERM, SIGUSR1, SIGUSR2 or the file STOP asked the run to stop, 130 after Ctrl-C.
    """
    with unseen("boto3"):  # which accelerate imports for SageMaker where it is: a sixth of the start
        from vaedist.backend import Backend
    from vaedist.config import ConfigError, dump
    from vaedist.peers import is_lost
    from vaedist.recipe import load, load_all
    from vaedist.replicas.backend import ReplicaBackend
    from vaedist.stop import Stop

    first = os.environ.get("RANK", "0") == "0"
    try:
        if work:
            recipe, dry_run = load(words)
            recipes = [recipe]
        else:
            recipes, dry_run = load_all(words)
        if dry_run:
            if first:
                print("---\n".join(map(dump, recipes)), end="")
            return 0
        backend = (Backend if len(recipes) == 1 else ReplicaBackend)(recipes[0].train)
    except (ConfigError, OSError) as error:
        if not first:
            time.sleep(PATIENCE)  # until the launcher ends us: it would end rank 0 before that one has said its line
        if first or os.environ.get("LOCAL_RANK") == "0":  # all of a machine have the same error, others may have none
            print(f"vaedist: {error}", file=sys.stderr, flush=True)
        return 1
    except RuntimeError as error:
        if not is_lost(error):
            raise
        reason = str(error).partition("\n")[0]
        print(f"vaedist: {os.environ['WORLD_SIZE']} processes did not find each other: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    with Stop() as stop:
        return run(recipes, backend, stop, work)


@contextmanager
def unseen(package: str) -> Iterator[None]:
    """While it is entered, who looks for the package finds none, unless it is imported already."""
    modules: dict[str, Any] = sys.modules
    modules.setdefault(package, None)
    try:
        yield
    finally:
        if modules[package] is None:
            del modules[package]


def run(recipes: "Sequence[Recipe]", backend: "Backend", stop: "Stop", work: "Work | None") -> int:
    """Works, and if that ends early has one of the processes say why. Returns the exit status."""
    from vaedist.peers import is_lost
    from vaedist.replicas.backend import ReplicaBackend
    from vaedist.replicas.run import train_replicas
    from vaedist.stop import StoppedError, ask_again
    from vaedist.trainer import USER_ERRORS, train

    peers = backend.peers()
    try:
        with stop.at_once():
            if isinstance(backend, ReplicaBackend):
                train_replicas(recipes, backend, stop)
            else:
                (work or train)(recipes[0], backend, stop)
        peers.close()
        backend.close()
        return 0
    except StoppedError as stopped:
        if stopped.step is None:
            for recipe in recipes if stopped.requeue and not work else ():
                ask_again(recipe.run)
            peers.end_before_start(f"{recipes[0].run}: {stopped}")
        return stopped.status
    except USER_ERRORS as error:
        peers.end(str(error))
    except RuntimeError as error:
        if not is_lost(error):
            raise
        if not work:  # another node may do; whoever starts it again looks whether the last start got on
            ask_again(recipes[0].run)
        peers.end_lost(error)
    return 1


def start(words: list[str], work: "Work | None" = None) -> None:
    """`main` as a program."""
    from vaedist.console import log_apart
    from vaedist.stop import follow_launcher

    follow_launcher()
    log_apart()
    status = main(words, work)
    if status:
        # The backend is not closed, since closing would wait for ranks that wait for this one. But its threads must not
        # meet the interpreter's end: one that then lets go of a tensor aborts the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    start(sys.argv[1:])
