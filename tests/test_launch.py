"""Every configuration of launch/ starts the processes that it says, here on CPUs that stand in for GPUs."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cases
import pytest
from launching import launch

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
# Flags for each, where two processes stand in for those it names, and the processes that then train.
STARTS = {"laptop": ((), 1), "gpu1": ((), 1), "cpu2": ((), 2), "gpus": (("--num_processes", "2"), 2)}
ELSEWHERE = {"node2x8", "zero2"}


@pytest.fixture(autouse=True)
def _on_cpus(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def words(data: Path, run: Path) -> list[str]:
    return cases.words("vae", data, run, train_steps=2, checkpoint_every=2, evaluate_names="[]")


def world_sizes(run: Path) -> list[int]:
    return [start["world_size"] for start in json.loads((run / "environment.json").read_text())]


def test_every_file_is_started_here_and_its_header_has_its_command():
    files = {path.stem: path.read_text() for path in LAUNCH.glob("*.yaml") if path.stem != "sweep"}
    assert files.keys() == STARTS.keys() | ELSEWHERE
    assert all(f"#   accelerate launch --config_file launch/{name}.yaml" in text for name, text in files.items())


@pytest.mark.parametrize(
    "name", ["laptop", *(pytest.param(name, marks=pytest.mark.slow) for name in STARTS if name != "laptop")]
)
def test_one_machine_starts_the_processes_that_its_file_says(name, data, tmp_path):
    flags, processes = STARTS[name]
    port = ("--main_process_port", "0") if processes > 1 else ()
    done = launch(*words(data, tmp_path), flags=("--config_file", str(LAUNCH / f"{name}.yaml"), *flags, *port))
    assert done.returncode == 0, done.stderr
    assert world_sizes(tmp_path) == [processes]
    assert len(cases.rows(tmp_path)) == 2


@pytest.mark.slow
def test_the_file_for_zero_2_starts_deepspeed(data, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")  # DeepSpeed finds out by itself
    flags = ("--config_file", str(LAUNCH / "zero2.yaml"), "--num_processes", "2", "--main_process_port", "0")
    done = launch(*words(data, tmp_path), flags=flags)
    assert done.returncode == 0, done.stderr
    assert "2 processes on CPU, DeepSpeed ZeRO-2, fp32" in done.stdout
    assert len(cases.rows(tmp_path)) == 2


@pytest.mark.slow
def test_two_machines_train_one_run(data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ("--config_file", str(LAUNCH / "node2x8.yaml"), "--num_processes", "2", "--main_process_ip", "127.0.0.1")

    def machine(rank: int):
        flags = (*common, "--machine_rank", str(rank), "--main_process_port", str(port))
        return launch(*words(data, tmp_path), flags=flags)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(machine, range(2))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert world_sizes(tmp_path) == [2]
    assert first.stdout.count("2 processes on CPU") + second.stdout.count("2 processes on CPU") == 1
    assert len(cases.rows(tmp_path)) == 2
