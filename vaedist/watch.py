"""The debug switches at work around the loop, and what torch cannot do as a line for the user."""

import os
import re
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from traceback import format_tb
from types import TracebackType
from typing import Any

import torch
from torch.profiler import profile, schedule

from vaedist.checkpoint import Progress
from vaedist.debug import Config, DivergedError
from vaedist.world import World

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent
FULL = re.compile(r"(CUDA|HIP)[^\n]*? out of memory(\. Tried to allocate [\d.]+ \w+)?|DefaultCPUAllocator: [^.\n]+")
SETTLE = 5  # steps before the profiled ones, which allocate, compile and tune; it looks on in the last two


class TorchError(Exception):
    """Torch cannot do what the recipe asks of this machine; the message is one line for the user."""


@dataclass
class Watch:
    """Around the loop of a run; `step` follows every step."""

    config: Config
    run: Path
    smaller: str  # what makes the same run of less memory
    progress: Progress
    world: World
    device: torch.device
    say: Callable[[str], None]
    _open: ExitStack = field(default_factory=ExitStack)
    _profile: profile | None = None
    _traced: bool = False

    def __enter__(self) -> "Watch":
        with ExitStack() as switches:
            switches.enter_context(explained(self.progress, self.smaller))
            if self.config.deterministic:
                switches.enter_context(deterministic())
            if self.config.anomaly:
                switches.enter_context(anomalies(self.progress))
            if self.config.profile:
                when = schedule(wait=SETTLE - 2, warmup=2, active=self.config.profile, repeat=1)
                self._profile = profile(schedule=when, on_trace_ready=self._write, acc_events=True)
                switches.enter_context(self._profile)
            self._open = switches.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.__exit__(kind, error, at)
        if self._profile is not None and not self._traced:
            self.say(f"debug.profile: no trace, the run ended within the {SETTLE} steps that go before it")

    def step(self) -> None:
        if self._profile is not None:
            self._profile.step()

    def memory(self) -> dict[str, float]:
        """With debug.memory the gigabytes of the rank that has taken most; every rank must call it.

        The peak: of what torch has taken of a GPU, since the last call; on a CPU of the process, since it began.
        """
        if not self.config.memory:
            return {}
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_reserved(self.device)  # a graph's tensors too, which nobody allocates
            torch.cuda.reset_peak_memory_stats(self.device)
        else:  # kibibytes, on macOS bytes
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"perf/memory_gb": max(self.world.everyone(peak)) / 1e9}

    def _write(self, found: profile) -> None:
        directory = self.run / "profile"
        name = f"step-{self.progress.step:08d}-rank{self.world.rank}.json.gz"
        directory.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(directory / f".{name}"))  # .gz: compressed
        (directory / f".{name}").rename(directory / name)
        self._traced = True
        self.say(
            f"{directory}: the last {self.config.profile} steps of every rank; open them in https://ui.perfetto.dev"
        )


@contextmanager
def deterministic() -> Iterator[None]:
    """Operations whose result may differ from call to call are refused, and new memory is filled."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch demands it, before the first product
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def anomalies(progress: Progress) -> Iterator[None]:
    """A NaN in a backward pass ends the run: DivergedError with the operation it comes from and where that is."""
    traceback = ""

    def keep(message: Warning | str, *rest: Any) -> None:
        nonlocal traceback
        if str(message).startswith("Error detected in"):
            traceback = str(message)
        else:
            show(message, *rest)

    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        warnings.filterwarnings("always", "Error detected in")
        show, warnings.showwarning = warnings.showwarning, keep  # type: ignore[assignment]
        try:
            yield
        except RuntimeError as error:
            found = re.match(r"Function '(\w+)' returned nan", str(error))
            if found is None:
                raise
            raise DivergedError(
                f"step {progress.step + 1}: {found[1]} gave a gradient with NaN{at(traceback)}"
            ) from error


@contextmanager
def explained(progress: Progress, smaller: str) -> Iterator[None]:
    """Raises TorchError in the place of torch's own errors that a user can do something about."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        operation, lacks, _ = text.partition(" does not have a deterministic implementation")
        if full := lack(error):
            line = f"{full}; {smaller}, and evaluations take less with a smaller evaluate.batch"
        elif lacks:
            line = f"{operation}{lacks} on this device; debug.deterministic=false allows it"
        elif text.startswith("vmap:"):
            line = f"train.replicas: {text.splitlines()[0]}{at(''.join(format_tb(error.__traceback__)))}"
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            said = " ".join(takewhile(lambda line: line.strip() and not line[0].isspace(), text.splitlines()))
            line = f"train.compile: {said}{at(text)}; train.compile=false trains the same"
        else:
            raise
        raise TorchError(f"step {progress.step + 1}: {line}") from error


@contextmanager
def fitting() -> Iterator[None]:
    """Raises TorchError where data set, weights or moments do not fit into memory, before the first step."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (full := lack(error)):
            raise
        raise TorchError(
            f"before the first step: {full}; make room on this device, or train a smaller model; data.store=host or "
            "tar keeps no images on a GPU"
        ) from error


def lack(error: Exception) -> str:
    """What an error says of memory that there is not, on a device or the host; nothing where it is about others."""
    if isinstance(error, MemoryError):
        return str(error) or "out of memory"  # Python's own says nothing, numpy's does
    # torch has a type for it on a GPU alone, and for a GPU that is full before it has begun not even there
    found = FULL.search(str(error))
    return found[0] if found else ""


def at(traceback: str) -> str:
    """Where our own innermost line is in a traceback, else the innermost; nothing where it has none."""
    calls = re.findall(r'File "(.+?)", line (\d+), in (\S+)', traceback)
    ours = [(path.relative_to(ROOT), *call) for name, *call in calls if (path := Path(name)).is_relative_to(PACKAGE)]
    if not calls:
        return ""
    path, line, function = (ours or calls)[-1]
    return f", at {path}:{line} in {function}"
