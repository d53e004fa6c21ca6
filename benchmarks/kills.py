"""Kills one process of a run with SIGKILL, again and again, and gives the same command again: what is lost?

    ./run python benchmarks/kills.py [COUNT] [--forked]      COUNT kills of runs on two processes; 100 without it

Moments are drawn by chance from every phase of a run, victims from its ranks. For each phase: how long the other rank
took to end at most, how many lines of ours said why, and whether the runs that were completed in spite of all have the
metrics of one that nobody disturbed, bit for bit. `--forked` imports torch once, and forks the ranks instead of
launching them: seconds less for each kill, and otherwise the same code.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))
import cases  # noqa: E402
from attempts import Forked, Launched, lines, wait  # noqa: E402

SETTINGS: dict[str, object] = {
    "train_steps": 40, "checkpoint_every": 3, "evaluate_every": 4, "evaluate_names": "[elbo, reconstructions]",
}  # fmt: skip


def phases(run: Path, cache: Path) -> dict[str, Callable[[], bool]]:
    """How one sees from outside that a run is in a phase; all but `start-up` are short."""
    rows, pictures = len(lines(run)), len(list((run / "pictures").glob("*")))
    some, since = random.randint(1, 6), time.time()

    def writes() -> bool:
        """Not: has a draft, which the process that was killed before may have left."""
        with suppress(FileNotFoundError):  # it is whole by now
            return any(draft.stat().st_mtime > since for draft in (run / "checkpoints").glob(".step-*.draft"))
        return False

    return {
        "start-up": lambda: True,
        "cache build": lambda: any(cache.glob("*.draft")),
        "training": lambda: len(lines(run)) >= rows + some or len(lines(run)) < rows,
        "checkpoint": writes,
        "evaluation": lambda: len(list((run / "pictures").glob("*"))) > pictures,
    }


def kill(start: Callable[[], Any], run: Path, cache: Path, phase: str, longest: float) -> float | None:
    """Seconds until all had ended after one was killed in `phase`; None if the run was over before."""
    if phase == "cache build":
        shutil.rmtree(cache, ignore_errors=True)
    reached = phases(run, cache)[phase]
    attempt = start()
    wait(lambda: attempt.ranks() or attempt.ended(), "the ranks")
    ranks = attempt.ranks()
    wait(lambda: reached() or attempt.ended(), phase)
    time.sleep(random.uniform(0, longest if phase == "start-up" else 0.02))
    victim = random.choice(ranks)
    if attempt.ended() or not victim.is_running():
        wait(attempt.ended, "the end")
        return None
    victim.send_signal(signal.SIGKILL)
    since = time.monotonic()
    wait(attempt.ended, "the end of the others", 0.02)
    return time.monotonic() - since


def end_all() -> None:
    """Ends what an error has left behind."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", nargs="?", type=int, default=100)
    parser.add_argument("--forked", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random.seed(options.seed)
    kind = Forked if options.forked else Launched
    with tempfile.TemporaryDirectory() as place, ExitStack() as at_end:
        at_end.callback(end_all)
        folder, log = Path(place), Path(place) / "log"
        subprocess.run([sys.executable, "-c", PACK, str(TESTS), str(folder / "set")], check=True)

        def start(run: Path) -> Any:
            return kind(cases.words("factorvae", folder / "set", run, **SETTINGS), log)

        since = time.monotonic()
        attempt = start(folder / "whole")
        wait(lambda: lines(folder / "whole") or attempt.ended(), "the first row")
        startup = time.monotonic() - since
        wait(attempt.ended, "the undisturbed run")
        whole = lines(folder / "whole")
        if len(whole) != SETTINGS["train_steps"]:
            raise RuntimeError(log.read_text())

        drawn, runs = list(phases(folder, folder)), [folder / "run-0"]
        ends: dict[str, list[float]] = {phase: [] for phase in drawn}
        said: dict[str, list[int]] = {phase: [] for phase in drawn}
        while sum(len(took) for took in ends.values()) < options.count:
            phase = min(drawn, key=lambda name: (len(ends[name]), random.random()))
            took = kill(lambda: start(runs[-1]), runs[-1], folder / "cache", phase, startup)
            if took is None:
                runs.append(folder / f"run-{len(runs)}")
                continue
            ends[phase].append(took)
            said[phase].append(sum(line.startswith("vaedist: ") for line in log.read_text().splitlines()))
            print(f"{phase}: ended after {took:.1f} s, {said[phase][-1]} lines", file=sys.stderr, flush=True)
        wait(start(runs[-1]).ended, "the last run")
        equal = [lines(run) == whole for run in runs]
        print(f"{'phase':12} {'kills':>5} {'slowest end':>12} {'lines':>7}")
        for name in drawn:
            slowest, most = max(ends[name], default=0.0), {min(said[name], default=0), max(said[name], default=0)}
            print(f"{name:12} {len(ends[name]):5} {slowest:10.1f} s {'-'.join(map(str, sorted(most))):>7}")
        print(f"{sum(equal)} of {len(runs)} runs have the metrics of the undisturbed one")
        sys.exit(not all(equal))


PACK = "import sys; sys.path.insert(0, sys.argv[1]); import pathlib, cases; cases.pack_discs(pathlib.Path(sys.argv[2]))"

if __name__ == "__main__":
    main()
