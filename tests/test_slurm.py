"""Jobs on a real SLURM cluster of two nodes: what a person submits, and what comes of it whatever SLURM does to it."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import cases
import psutil
import pytest
from attempts import lines
from slurm_cluster import Cluster, installed, wait

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
LONG = {"train_steps": 2000, "checkpoint_every": 1000, "evaluate_every": 1000, "train_precision": "fp64"}
EXACT = 1e-9  # of a term, in fp64

pytestmark = pytest.mark.skipif(not installed(), reason="needs SLURM: apt-get install slurm-wlm")


@pytest.fixture(scope="module", params=["pgid", pytest.param("linuxproc", marks=pytest.mark.slow)])
def slurm(request, tmp_path_factory) -> Iterator[Cluster]:
    with closing(Cluster(tmp_path_factory.mktemp("cluster"), request.param)) as found:
        yield found


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory) -> Callable[[int], list[dict[str, float]]]:
    """The rows of the first steps of the run of all jobs here, on one process that nobody disturbs."""
    run, found = tmp_path_factory.mktemp("reference"), []

    def rows(steps: int) -> list[dict[str, float]]:
        if len(found) < steps:  # it goes on where it was
            cases.run("conv64", data, run, **LONG | {"train_steps": steps, "checkpoint_every": steps})
            found[:] = lines(run)
        return found[:steps]

    return rows


class Submitted:
    """A job that trains, as a person submits it from the checkout."""

    def __init__(self, slurm: Cluster, words: list[str], run: Path, *options: str, **environment: object) -> None:
        self.slurm, self.run, self.log = slurm, run, run.with_suffix(".log")
        command = ["sbatch", "--parsable", f"--output={self.log}", f"--chdir={ROOT}", *options, str(SCRIPT), *words]
        self.number = slurm(*command, **{"PROCESSES": 2} | environment).strip()

    def steps(self) -> int:
        return len(lines(self.run))

    def text(self) -> str:
        return self.log.read_text()

    def trains(self, more: int = 3) -> None:
        """Waits for some steps."""
        before = self.steps()
        wait(lambda: self.steps() >= before + more or self.ended(), f"steps of job {self.number}")
        assert not self.ended(), self.text()

    def ended(self) -> bool:
        return self.slurm.ended(self.number)

    def goes_on(self) -> None:
        """Waits until it has been requeued and has trained on."""
        before = self.steps()
        wait(lambda: self.steps() > before + 3 or self.ended(), f"a second start of job {self.number}", pause=0.5)
        assert not self.ended(), self.text()
        assert int(self.slurm.job(self.number)["Restarts"]) == 1

    def ends_by_stop(self) -> None:
        (self.run / "STOP").touch()
        end = self.slurm.end(self.number)
        assert (end["JobState"], end["ExitCode"]) == ("FAILED", "1:0")
        *_, last = self.text().splitlines()
        assert re.match(r"train.sbatch: not complete: .*/run: stopped at step \d+ by the file STOP; the same", last), (
            last
        )
        assert not (self.run / "STOP").exists()
        assert not (self.run / "REQUEUE").exists()


def same(run: Path, reference: Callable[[int], list[dict[str, float]]]) -> int:
    """How many rows of a run are those of the reference, every step once; all, or the test fails."""
    found = lines(run)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    for row, expected in zip(found, reference(len(found)), strict=True):
        terms = {name for name in row if name.startswith("train/")}
        assert terms == {name for name in expected if name.startswith("train/")}
        for name in terms:
            assert row[name] == pytest.approx(expected[name], rel=EXACT), (row["step"], name)
    return len(found)


def alive(run: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(run) in word for word in process.info["cmdline"] or ()) and process.pid != os.getpid():
            found.append(process)
    return found


def lose_a_node(job: Submitted) -> None:
    job.slurm.kill("node2")
    wait(lambda: job.slurm.state(job.number) == "PENDING", "SLURM noticing it")
    # A node is back after minutes. SLURM's controller keeps the end of the job's step for it, which is due after some
    # fifty seconds and would meet the next start, whose step has the same number.
    time.sleep(70)
    job.slurm.start("node2")


def preempt(job: Submitted) -> None:
    job.slurm("srun", "--partition=urgent", "--nodes=2", "--exclusive", "true")


INTERRUPTIONS: dict[str, Callable[[Submitted], object]] = {
    "the signal before the time limit": lambda job: job.slurm("scancel", "--signal=USR2", job.number),
    "requeued by a person": lambda job: job.slurm("scontrol", "requeue", job.number),
    "preempted": preempt,
    "a node dies": lose_a_node,
}


@pytest.mark.parametrize(
    "how",
    [name if number == 0 else pytest.param(name, marks=pytest.mark.slow) for number, name in enumerate(INTERRUPTIONS)],
)
def test_four_processes_on_two_nodes_go_on_after_an_interruption_with_the_same_curve(
    how, slurm, data, tmp_path, reference
):
    run = tmp_path / "run"
    job = Submitted(slurm, cases.words("conv64", data, run, **LONG | {"checkpoint_every": 4}), run, "--nodes=2")
    job.trains(more=6)
    INTERRUPTIONS[how](job)
    job.goes_on()
    job.ends_by_stop()
    assert same(run, reference) > 10
    starts = json.loads((run / "environment.json").read_text())
    assert [start["world_size"] for start in starts] == [4, 4]
    assert [start["slurm"].get("restart", "0") for start in starts] == ["0", "1"]
    assert starts[1]["step"] >= 4
    assert alive(run) == []
    golden = json.loads(cases.GOLDEN.read_text())["conv64"]["train/loss"]
    for row, loss in zip(lines(run), golden, strict=False):
        assert row["train/loss"] == pytest.approx(loss, rel=EXACT)


@pytest.mark.slow
def test_a_job_whose_starts_come_to_nothing_is_requeued_once_and_no_more(slurm, data, tmp_path):
    run = tmp_path / "run"
    job = Submitted(slurm, cases.words("conv64", data, run, **LONG), run)

    def die(restart: str) -> None:
        """One of its ranks does, before there is a checkpoint."""
        wait(lambda: slurm.job(job.number)["Restarts"] == restart and job.steps() > 1, "steps", pause=0.5)
        next(process for process in alive(run) if process.environ().get("RANK") == "1").kill()
        wait(lambda: slurm.state(job.number) != "RUNNING", "the end of this start")
        (run / "metrics.jsonl").unlink()  # so that the rows of the next one are seen

    die("0")
    die("1")
    assert slurm.end(job.number)["JobState"] == "FAILED"
    *_, last = job.text().splitlines()
    assert "not requeued, since neither this start nor the last one made a checkpoint: vaedist: rank 1 of 2" in last


@pytest.mark.slow
def test_a_job_that_has_been_requeued_often_enough_is_left_alone(slurm, data, tmp_path):
    run = tmp_path / "run"
    job = Submitted(slurm, cases.words("conv64", data, run, **LONG), run, MAX_REQUEUES=0)
    job.trains()
    slurm("scancel", "--signal=USR2", job.number)
    end = slurm.end(job.number)
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0")
    *_, last = job.text().splitlines()
    assert re.search(r"not requeued after MAX_REQUEUES=0 times: \S+: stopped at step \d+ by SIGUSR2; the same", last)


class Command:
    """`python -m launch.slurm ...`, given in a directory that is not the checkout."""

    def __init__(self, slurm: Cluster, directory: Path) -> None:
        self.slurm, self.directory = slurm, directory

    def __call__(self, *arguments: str) -> str:
        environment = self.slurm.environment | {"PROCESSES": "1", "VAEDIST": str(ROOT / "run")}
        done = subprocess.run(
            [sys.executable, "-m", "launch.slurm", *arguments],
            cwd=self.directory, env=environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.mark.parametrize("more", [[], pytest.param(["--evaluate"], marks=pytest.mark.slow)], ids=str)
def test_a_sweep_is_an_array_of_ordinary_runs_which_may_be_evaluated_when_they_are_complete(
    more, slurm, data, tmp_path
):
    command = Command(slurm, tmp_path)
    words = cases.words("conv64", data, tmp_path, train_steps=3, checkpoint_every=3, evaluate_every=3)
    words = [word for word in words if not word.startswith("run=")]
    said = command(*words, "--sweep", "seed=0,1", "--gpus", "0", *more)
    found = dict(re.findall(r"(\S+): job (\d+_\d), log \S+", said))
    assert len(found) == 2
    for run, job in found.items():
        assert slurm.end(job)["JobState"] == "COMPLETED", (tmp_path / run).with_name(f"slurm-{job}.log").read_text()
    for run, evaluation in re.findall(r"(\S+): evaluated by job (\d+)", said):
        assert slurm.end(evaluation)["JobState"] == "COMPLETED", next((tmp_path / run).glob("evaluate-*")).read_text()
    losses = set()
    for run in found:
        *_, last = cases.rows(tmp_path / run)
        losses.add(last["train/loss"])
        for metrics in [tmp_path / run / "evaluation" / "step-00000003" / "metrics.json"] if more else []:
            evaluated = json.loads(metrics.read_text())
            assert evaluated == {name: value for name, value in last.items() if name in evaluated}
            assert "eval/elbo" in evaluated
        assert f"complete at step 3; log {tmp_path}" in command("status", run)
        assert "complete" in command("logs", run)
    assert len(losses) == 2
    recipe = (tmp_path / run / "recipe.yaml").read_text()
    assert "group: celeba64 seed=0,1" in recipe


def test_a_recipe_that_is_wrong_fails_the_job_and_its_logs_last_line_says_why(slurm, data, tmp_path):
    job = Submitted(slurm, [*cases.words("conv64", data, tmp_path / "run"), "objective.gama=1"], tmp_path / "run")
    end = slurm.end(job.number)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "1:0", "0")
    *_, last = job.text().splitlines()
    assert re.match(r"train.sbatch: not complete: vaedist: command line: objective.gama=1 .* did you mean gamma", last)


def test_a_job_can_be_looked_at_before_it_is_submitted_and_stopped_before_it_starts(slurm, data, tmp_path):
    command = Command(slurm, tmp_path)
    words = cases.words("conv64", data, tmp_path / "run")
    dry = command(*words, "--gpus=0", "--time=0:30:00", "--comment=mine", "--dry-run")
    assert re.search(r"\nsbatch --comment=mine --nodes=1 \S+ --job-name=run --time=0:30:00 \S+train.sbatch rec", dry)
    assert "to start at" in dry  # by SLURM's own reckoning
    assert not (tmp_path / "run").exists()
    command(*words, "--gpus=0", "--hold")
    assert "PENDING (JobHeldUser); step 0, nothing saved yet" in command("status", str(tmp_path / "run"))
    assert "has not started and is cancelled" in command("stop", str(tmp_path / "run"))
    assert "CANCELLED" in command("status", str(tmp_path / "run"))


def test_the_parts_of_a_set_are_packed_by_a_job_array(slurm, tmp_path):
    words = ("--count", "40", "--shard-mb", "0.1")
    number = slurm(
        "sbatch", "--parsable", "--array=0-1", f"--chdir={ROOT}", f"--output={tmp_path}/%a.log", "--cpus-per-task=1",
        str(SCRIPT.with_name("pack.sbatch")), "faces", str(tmp_path / "set"), *words,
    ).strip()  # fmt: skip
    for task in range(2):
        assert slurm.end(f"{number}_{task}")["JobState"] == "COMPLETED", (tmp_path / f"{task}.log").read_text()
    subprocess.run([sys.executable, "-m", "shards", "pack", "faces", tmp_path / "whole", *words], check=True, cwd=ROOT)
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == files
    assert len([name for name in files if name.endswith(".tar")]) > 2


def test_a_job_that_is_cancelled_has_saved_and_leaves_nothing_behind(slurm, data, tmp_path):
    """Its shards were staged."""
    run, stage = tmp_path / "run", tmp_path / "stage"
    job = Submitted(slurm, cases.words("conv64", data, run, **LONG), run, PROCESSES=1, STAGE=stage)
    job.trains()
    assert {shard.stat().st_size for shard in data.glob("*.tar")} <= {
        path.stat().st_size for path in (stage / "shards").iterdir()
    }
    slurm("scancel", job.number)
    assert slurm.end(job.number)["JobState"] == "CANCELLED"
    wait(lambda: not alive(run), "the end of its processes")
    (saved,) = (run / "checkpoints").glob("step-*")
    assert int(saved.name.removeprefix("step-")) == job.steps()
