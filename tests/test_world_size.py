"""The promise of the project: the same losses from any number of processes, under accumulation, and after a restart."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch
from launching import launch
from worker import methods

from vaedist.world import World

WORKER = Path(__file__).with_name("worker.py")
GOLDEN = json.loads(cases.GOLDEN.read_text())
assert GOLDEN.keys() == cases.CASES.keys(), "a new objective: `./run python tests/cases.py` writes its golden losses"
ALONE = [case for case in cases.CASES if case not in cases.COUPLED]


def distance(directory: Path, case: str) -> float:
    """The largest difference of any term at any step from the golden ones, relative to the larger of it and a nat."""
    found, golden = cases.terms(directory), GOLDEN[case]
    assert found.keys() == golden.keys()
    return max(relative(found[name], golden[name]) for name in golden)


def steps(case: str) -> int:
    return int((cases.COMMON | cases.CASES[case])["train.steps"])


def loss_distance(directory: Path, case: str) -> float:
    """The same for the loss alone: Adam amplifies the round-off of float32, in small terms first."""
    return relative(cases.terms(directory)["train/loss"], GOLDEN[case]["train/loss"])


def relative(found: list[float], golden: list[float]) -> float:
    """Of a run that was stopped early, as far as it went."""
    golden = golden[: len(found)]
    return max(abs(a - b) / max(abs(b), 1) for a, b in zip(found, golden, strict=True))


PRECISIONS = pytest.mark.parametrize(
    ("precision", "measure", "tolerance"), [("fp64", distance, 1e-9), ("fp32", loss_distance, 1e-4)]
)


@pytest.fixture(scope="session")
def stopped(data, tmp_path_factory) -> Path:
    """The runs that one process left half way, in four micro-batches a step where that is not another run."""
    out = tmp_path_factory.mktemp("stopped")
    for case in cases.CASES:
        more = {"train_steps": steps(case) // 2, "train_accumulate": 4 if case in ALONE else 1}
        for precision in ("fp64", "fp32"):
            cases.run(case, data, out / f"{case}-{precision}-moved", train_precision=precision, **more)
    return out


ON_TWO = pytest.mark.parametrize("launched", [2], indirect=True)


@pytest.fixture(scope="session", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def launched(request, data, stopped, tmp_path_factory) -> tuple[int, Path, dict]:
    """What worker.py found on so many processes: the number, the directory of its runs, and its own report."""
    out = tmp_path_factory.mktemp(f"processes{request.param}")
    shutil.copytree(stopped, out, dirs_exist_ok=True)
    done = launch("everything", data, out, processes=request.param, script=WORKER, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((out / "found.json").read_text())
    assert found["world_size"] == request.param
    return request.param, out, found


@PRECISIONS
@pytest.mark.parametrize("case", cases.CASES)
def test_one_process_reaches_the_golden_losses(case, precision, measure, tolerance, data, tmp_path):
    cases.run(case, data, tmp_path, train_precision=precision)
    assert measure(tmp_path, case) <= tolerance


@PRECISIONS
@pytest.mark.parametrize("case", ALONE)
def test_accumulation_reaches_the_golden_losses(case, precision, measure, tolerance, stopped):
    directory = stopped / f"{case}-{precision}-moved"
    assert len(cases.rows(directory)) == steps(case) // 2
    assert measure(directory, case) <= tolerance


@PRECISIONS
@pytest.mark.parametrize("case", cases.CASES)
def test_several_processes_reach_the_golden_losses(case, precision, measure, tolerance, launched):
    _, out, _ = launched
    assert measure(out / f"{case}-{precision}", case) <= tolerance


def test_several_processes_hold_equal_parameters(launched):
    assert launched[2]["equal_parameters"] == {
        f"{case}-{precision}": True for case in cases.CASES for precision in ("fp64", "fp32")
    }


@ON_TWO
@pytest.mark.parametrize("case", cases.CASES)
def test_a_resumed_run_on_as_many_processes_is_the_same_bit_for_bit(case, launched):
    _, out, _ = launched
    resumed, whole = (cases.rows(out / name) for name in (f"{case}-resumed", f"{case}-fp32"))
    without_clock = [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in resumed]
    assert without_clock == [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in whole]


def test_the_worlds_methods_and_batch_normalisation_are_those_of_one_process(launched):
    for name, value in methods(World()).items():
        torch.testing.assert_close(
            torch.tensor(launched[2][name], dtype=torch.float64).flatten(),
            torch.tensor(value, dtype=torch.float64).flatten(), rtol=1e-10, atol=1e-12, msg=name,
        )  # fmt: skip


@ON_TWO
@PRECISIONS
@pytest.mark.parametrize("case", cases.CASES)
def test_a_run_stopped_on_one_process_goes_on_with_two(case, precision, measure, tolerance, launched):
    """In four micro-batches, then in two on each process."""
    _, out, _ = launched
    assert len(cases.rows(out / f"{case}-{precision}-moved")) == steps(case)
    assert measure(out / f"{case}-{precision}-moved", case) <= tolerance


def test_a_run_killed_on_two_processes_goes_on_with_one(data, tmp_path):
    run = tmp_path / "killed"
    done = launch("die", data, run, "factorvae", "fp64", processes=2, script=WORKER)
    assert done.returncode != 0
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000006"]
    assert 7 <= len(cases.rows(run)) <= 8  # more than the checkpoint knows: the resumed run makes them again
    cases.run("factorvae", data, run, train_precision="fp64")
    assert len(cases.rows(run)) == steps("factorvae")
    assert distance(run, "factorvae") <= 1e-9


@pytest.mark.gpu
def test_two_processes_that_share_a_gpu_reach_the_golden_losses(data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, "share", data, tmp_path],
            env=os.environ | {name: str(value) for name, value in (where | {"RANK": rank}).items()},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said[0][1][-2000:] + said[1][1][-2000:]
    name = torch.cuda.get_device_name()
    assert f"2 processes on {name}, fp32" in said[0][0]
    assert "not as one CUDA graph: the processes share gradients by gloo, on the CPU" in said[0][0]
    assert {case: loss_distance(tmp_path / case, case) <= 1e-4 for case in cases.CASES} == dict.fromkeys(
        cases.CASES, True
    )
