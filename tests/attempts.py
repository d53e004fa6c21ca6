"""A run on two processes that is watched while it goes on, launched as a user does or forked from this process."""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
SCRIPT = Path(__file__).with_name("tiny_train.py")
PROCESSES = 2
PATIENCE = 120.0  # seconds


class Launched:
    """The command as a user gives it; its output is in `log`."""

    def __init__(self, words: list[str], log: Path, flags: tuple[str, ...] = ()) -> None:
        launcher = [Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu", "--main_process_port", "0"]
        command = [*map(str, launcher), "--num_processes", str(PROCESSES), *flags, str(SCRIPT), *words]
        with log.open("wb") as stream:
            self.process = psutil.Popen(command, stdout=stream, stderr=subprocess.STDOUT)

    def ranks(self) -> list[psutil.Process]:
        """In order, as soon as they are all there."""
        found = {}
        for child in self.process.children():
            with suppress(psutil.Error):  # it has just ended
                if rank := child.environ().get("RANK"):  # before exec it is the launcher's copy
                    found[int(rank)] = child
        return [found[rank] for rank in sorted(found)] if len(found) == PROCESSES else []

    def ended(self) -> bool:
        return self.process.poll() is not None


class Forked:
    """The ranks as children of this process, which holds their store and ends them all as the launcher's agent would.

    Importing torch takes many times as long as such a run.
    """

    def __init__(self, words: list[str], log: Path) -> None:
        import tiny_train
        import torch._dynamo  # noqa: F401  optimisers import it, for seconds: once, before the fork
        from torch.distributed import TCPStore

        from vaedist import peers, recipe, train

        peers.ANSWER = 1.0
        recipe.load_all = tiny_train.load_tiny
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.environ |= {"WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(self.store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ |= {"TORCHELASTIC_RESTART_COUNT": "0", "ACCELERATE_USE_CPU": "true"}
        self.failed = 0.0  # when the first rank did
        self.statuses: list[int | None] = [None] * PROCESSES  # of the ranks that have ended

        def run(rank: int) -> int:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            return train.main(words)

        with log.open("wb") as stream:
            self.children = [psutil.Process(forked(run, rank)) for rank in range(PROCESSES)]

    def ranks(self) -> list[psutil.Process]:
        return self.children

    def ended(self) -> bool:
        for rank, child in enumerate(self.children):
            if self.statuses[rank] is None:
                pid, status = os.waitpid(child.pid, os.WNOHANG)
                self.statuses[rank] = os.waitstatus_to_exitcode(status) if pid else None
        running = [child for child, status in zip(self.children, self.statuses, strict=True) if status is None]
        if any(self.statuses) and not self.failed:
            self.failed = time.monotonic()
            for child in running:
                child.terminate()
        elif self.failed and time.monotonic() > self.failed + 30:
            for child in running:
                child.kill()
        return not running


def forked(work: Callable[[int], int], rank: int) -> int:
    """The id of a child that ends with the status that `work` gives, and never in its parent's code."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            status = work(rank)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def lines(run: Path) -> list[dict[str, float]]:
    """The rows of a run without what depends on the clock; a half-written one is none."""
    path, found = run / "metrics.jsonl", []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if line.endswith("\n"):
            row = json.loads(line)
            found.append({name: value for name, value in row.items() if not name.startswith("perf/")})
    return found


def wait(until: Callable[[], Any], what: str, pause: float = 0.002) -> None:
    limit = time.monotonic() + PATIENCE
    while not until():
        if time.monotonic() > limit:
            raise TimeoutError(f"{what}: nothing within {PATIENCE:.0f} s")
        time.sleep(pause)
