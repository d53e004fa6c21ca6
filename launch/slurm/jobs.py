"""What SLURM and the run directory know of a run together, without accounting: most small clusters have none."""

import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.files import replacing
from vaedist import rows
from vaedist.checkpoint import newest_first, step_of
from vaedist.stop import FILES, REQUEUE, STOP
from vaedist.words import ConfigError, Node, from_file

JOB = "job"  # the file of a run directory that names its newest job and that job's log
LIVE = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED")
LINES = 40  # of a log's end


@dataclass(frozen=True)
class Job:
    """The newest job of a run."""

    number: str
    log: Path

    @classmethod
    def of(cls, run: Path) -> "Job":
        """Raises ConfigError where the run has had none."""
        try:
            number, log = (run / JOB).read_text().splitlines()
        except (OSError, ValueError):
            raise ConfigError(f"{run}: no job of SLURM has been submitted for it") from None
        return cls(number, Path(log))

    def write(self, run: Path) -> None:
        run.mkdir(parents=True, exist_ok=True)
        with replacing(run / JOB) as file:
            file.write(f"{self.number}\n{self.log}\n".encode())

    def fields(self) -> dict[str, str]:
        """What SLURM says of it; nothing once it has forgotten it, some minutes after its end."""
        done = subprocess.run(["scontrol", "--oneliner", "show", "job", self.number], capture_output=True, text=True)
        lines = done.stdout.splitlines() if done.returncode == 0 else []
        return dict(word.partition("=")[::2] for word in lines[0].split(" ") if "=" in word) if lines else {}


def status(run: Path) -> str:
    """One line: the job's state, how far the run is, and where to read on."""
    if run.is_dir() and not (run / JOB).exists():  # a replica of a job that `sbatch` began, or a run without SLURM
        return f"{run}: no job of its own; {_progress(run)}"
    job = Job.of(run)
    fields = job.fields()
    words = [f"{run}: job {job.number}", fields.get("JobState", "no longer known to SLURM")]
    if fields.get("JobState") in LIVE:
        words.append(f"on {fields['NodeList']} for {fields['RunTime']} of {fields['TimeLimit']}")
    elif fields.get("JobState") == "PENDING":
        words.append(f"({fields['Reason']})")
    if fields.get("Restarts", "0") != "0":
        words.append(f"after {fields['Restarts']} restarts")
    if (run / REQUEUE).exists():
        words.append("asks to be started again")
    return f"{' '.join(words)}; {_progress(run)}; log {job.log}"


def _progress(run: Path) -> str:
    saved = newest_first(run / "checkpoints")
    steps = _steps(run)
    done = _last_step(run / "metrics.jsonl")
    if saved and step_of(saved[0]) == steps:
        return f"complete at step {steps}"
    kept = f"step {step_of(saved[0])} saved" if saved else "nothing saved yet"
    return f"step {done}{f' of {steps}' if steps else ''}, {kept}"


def _steps(run: Path) -> int | None:
    """Of the whole run, as its recipe says."""
    try:
        node: Node | None = from_file(run / "recipe.yaml").section()["train"].section()["steps"]
        return int(str(node))
    except (ConfigError, KeyError, ValueError):
        return None


def _last_step(metrics: Path) -> int:
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return int(rows.parsed(whole[-1], f"{metrics}:{len(lines)}")["step"]) if whole else 0


def logs(run: Path, follow: bool) -> None:
    """The end of the job's log, in the place of this process; the ranks' logs are named."""
    job = Job.of(run)
    others = sorted((run / "logs").glob("*/*.log"))
    if others:
        newest = max(others, key=lambda path: path.stat().st_mtime).parent
        print(f"the other ranks: {newest}/rank-*.log", flush=True)
    if not job.log.exists():
        raise ConfigError(f"{job.log}: there is no log yet; job {job.number} is {_state(job)}")
    print(f"==> {job.log} <==", flush=True)
    tail = ["tail", "--lines", str(LINES), *(["--follow=name", "--retry"] if follow else []), str(job.log)]
    os.execvp("tail", tail)


def stop(run: Path) -> str:
    """Has a running job save and end, or a waiting one not start; what was done."""
    job = Job.of(run)
    state = _state(job)
    if state == "PENDING":
        _command(["scancel", job.number])
        return f"{run}: job {job.number} has not started and is cancelled"
    if state not in LIVE:
        raise ConfigError(f"{run}: job {job.number} is {state}; there is nothing to stop")
    (run / FILES[STOP]).touch()
    return f"{run}: job {job.number} will save and end after its next step; the same command resumes the run"


def _state(job: Job) -> str:
    return job.fields().get("JobState", "no longer known to SLURM")


def _command(words: Sequence[str]) -> str:
    """What a command of SLURM prints. Raises ConfigError with what it complains of."""
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        raise ConfigError(f"{words[0]}: not found: is this a login node of the cluster?") from None
    if done.returncode:
        raise ConfigError(f"{words[0]}: {done.stderr or done.stdout or f'status {done.returncode}'}")
    return done.stdout


def submit(options: Sequence[str], script: Path, words: Sequence[str]) -> str:
    """Submits a script with these words; the job's number."""
    return _command(["sbatch", "--parsable", *options, str(script), *words]).strip().partition(";")[0]


def when(options: Sequence[str], script: Path, words: Sequence[str]) -> str:
    """When SLURM thinks that it would start; nothing is submitted. Raises ConfigError if it would refuse."""
    try:
        done = subprocess.run(["sbatch", "--test-only", *options, str(script), *words], capture_output=True, text=True)
    except FileNotFoundError:
        return "there is no sbatch here to ask"
    lines = [line.removeprefix("sbatch: ") for line in done.stderr.splitlines()]
    if done.returncode:
        raise ConfigError(f"sbatch: {' '.join(lines)}")
    return " ".join(lines)
