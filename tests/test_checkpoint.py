"""Checkpoints: whole or not there, of exact content, and never unpickled."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from vaedist.backend import Backend, Config, on_cpu
from vaedist.checkpoint import CheckpointError, Checkpoints, Progress, Snapshot, State


def trained(steps: int, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small module with a buffer after some steps of Adam with two groups."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    groups = [
        {"params": module[0].parameters()},
        {"params": [*module[1].parameters(), *module[2].parameters()], "lr": 0.1},
    ]
    optimizer = torch.optim.Adam(groups, fused=True)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        module(torch.randn(5, 3, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def prepared(module: nn.Module, optimizer: torch.optim.Optimizer, snapshot: Snapshot | None = None) -> Backend:
    backend = Backend(Config())
    backend.prepare(module, optimizer, snapshot)
    return backend


def save(checkpoints: Checkpoints, step: int, module: nn.Module, optimizer: torch.optim.Optimizer):
    backend = prepared(module, optimizer)
    return checkpoints.save(
        State(
            progress=Progress(step, 64 * step), meters=[{"loss": 0.1}], scaling={}, data="digest", recipe={"seed": 0},
            weights=on_cpu(backend.weights()), moments=on_cpu(backend.moments()),
        )
    )  # fmt: skip


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    save(checkpoints, 5, *trained(5))
    module, optimizer = trained(0, seed=1)
    snapshot = checkpoints.newest(pytest.fail)
    prepared(module, optimizer, snapshot)
    assert (snapshot.progress, snapshot.meters, snapshot.data) == (Progress(5, 320), [{"loss": 0.1}], "digest")

    reference, reference_optimizer = trained(5)
    for net, adam in ((module, optimizer), (reference, reference_optimizer)):
        for _ in range(3):
            net(torch.ones(5, 3)).square().sum().backward()
            adam.step()
            adam.zero_grad()
    ours, theirs = module.state_dict(), reference.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_moments_are_kept_by_the_name_of_their_parameter(tmp_path):
    path = save(Checkpoints(tmp_path, keep=3), 1, *trained(1))
    with safe_open(path / "optimizer.safetensors", "pt") as file:
        names = set(file.keys())
    parameters = ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias")
    assert names == {f"{name}/{key}" for name in parameters for key in ("step", "exp_avg", "exp_avg_sq")}
    assert {file.name for file in path.iterdir()} == {
        "state.json",
        "weights.safetensors",
        "optimizer.safetensors",
        "SHA256SUMS",
    }
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=path, check=True, capture_output=True)
    json.loads((path / "state.json").read_text())


def test_the_newest_so_many_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 100, 20_000):
        save(checkpoints, step, *trained(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000100", "step-00020000"]


def test_a_corrupt_future_is_given_up_and_never_the_checkpoint_just_written(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (20, 30):
        save(Checkpoints(tmp_path, keep=2), step, *trained(1))
    (tmp_path / "step-00000030" / "state.json").unlink()
    (tmp_path / ".step-00000040.draft").mkdir()
    assert checkpoints.newest(lambda line: None).progress.step == 20
    save(checkpoints, 25, *trained(1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000025"]


def test_no_checkpoint_is_a_fresh_start(tmp_path):
    assert Checkpoints(tmp_path / "none", keep=3).newest(pytest.fail) is None


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, name):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2):
        save(checkpoints, step, *trained(step))
    file = tmp_path / "step-00000002" / name
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    lines: list[str] = []
    assert checkpoints.newest(lines.append).progress == Progress(1, 64)
    assert len(lines) == 1
    assert "step-00000002" in lines[0]
    assert lines[0].endswith("trying the one before it")
    save(checkpoints, 2, *trained(2))  # made again in its place
    assert checkpoints.newest(pytest.fail).progress.step == 2


def test_when_every_checkpoint_is_damaged_the_run_does_not_start_anew_by_itself(tmp_path):
    path = save(Checkpoints(tmp_path, keep=3), 1, *trained(1))
    (path / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole; move the run directory away to start anew"):
        Checkpoints(tmp_path, keep=3).newest(lambda line: None)


def test_weights_of_another_model_are_refused(tmp_path):
    save(Checkpoints(tmp_path, keep=3), 1, *trained(1))
    snapshot = Checkpoints(tmp_path, keep=3).newest(pytest.fail)
    other = nn.Linear(3, 4)
    with pytest.raises(CheckpointError, match="the weights are of another model"):
        prepared(other, torch.optim.Adam(other.parameters()), snapshot)


def test_kill_9_at_any_moment_leaves_the_last_whole_checkpoint(tmp_path):
    """Processes that do nothing but save are killed at twenty random moments; see `save_and_die.py`."""
    script = Path(__file__).with_name("save_and_die.py")
    done = subprocess.run([sys.executable, script, tmp_path, "20"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    trials = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(trials) == 20
    assert all(trial["found"] >= trial["saved"] > 0 for trial in trials)
    assert any(trial["drafts"] for trial in trials)  # some of the kills did hit a write
