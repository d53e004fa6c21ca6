"""Checkpoints: whole or not there, of exact content, and never unpickled."""

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from vaedist import checkpoint
from vaedist.backend import Backend, Config, on_cpu
from vaedist.checkpoint import CheckpointError, Checkpoints, Progress, Snapshot, State, Writer
from vaedist.checkpoint_commands import main as command


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


def state(step: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    backend = prepared(module, optimizer)
    return State(
        progress=Progress(step, 64 * step), meters=[{"loss": 0.1}], scaling={}, data="digest", recipe={"seed": 0},
        weights=on_cpu(backend.weights()), moments=on_cpu(backend.moments()),
    )  # fmt: skip


def save(checkpoints: Checkpoints, step: int, module: nn.Module, optimizer: torch.optim.Optimizer):
    return checkpoints.save(state(step, module, optimizer))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


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


def test_the_newest_so_many_are_kept_and_every_nth_for_ever(tmp_path):
    net = trained(1)
    for step in (5, 100, 150, 20_000, 99_999_999, 100_000_000):
        save(Checkpoints(tmp_path, keep=2, keep_every=100), step, *net)
    assert names(tmp_path) == [
        "step-00000100", "step-00020000", "step-100000000", "step-99999999"
    ]  # fmt: skip
    save(Checkpoints(tmp_path, keep=2), 100_000_001, *net)
    assert names(tmp_path) == ["step-100000000", "step-100000001"]
    assert Checkpoints(tmp_path, keep=2).newest(pytest.fail).progress.step == 100_000_001


def test_a_corrupt_future_is_given_up_and_never_the_checkpoint_just_written(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step in (20, 30):
        save(Checkpoints(tmp_path, keep=2), step, *trained(1))
    (tmp_path / "step-00000030" / "state.json").unlink()
    (tmp_path / ".step-00000040.draft").mkdir()
    assert checkpoints.newest(lambda line: None).progress.step == 20
    save(checkpoints, 25, *trained(1))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000025"]


def test_what_a_resumed_run_passed_over_is_not_counted_among_those_that_are_kept(tmp_path):
    for step in (4, 8, 12):
        save(Checkpoints(tmp_path, keep=3), step, *trained(1))
    (tmp_path / "step-00000012" / "state.json").unlink()
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.newest(lambda line: None).progress.step == 8
    checkpoints.refuse_later(8)
    assert "step-00000008 is the newest checkpoint" in checkpoints._unsaved(16, OSError(errno.ENOSPC, "full"))
    save(checkpoints, 16, *trained(1))
    assert names(tmp_path) == ["step-00000008", "step-00000016"]
    with pytest.raises(CheckpointError, match=r": another process has trained this run meanwhile, to step 16; give"):
        checkpoints.refuse_later(8)


def test_who_reads_while_a_run_goes_on_finds_the_next_one_where_one_is_removed(tmp_path, monkeypatch):
    save(Checkpoints(tmp_path, keep=1), 1, *trained(1))
    read = checkpoint._read

    def too_late(path: Path) -> Snapshot:
        monkeypatch.undo()
        save(Checkpoints(tmp_path, keep=1), 2, *trained(1))
        return read(path)

    monkeypatch.setattr(checkpoint, "_read", too_late)
    assert Checkpoints(tmp_path, keep=1).newest(lambda line: None).progress.step == 2


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


@pytest.mark.parametrize("name", ["weights.safetensors", "averaged.safetensors", "state.json"])
def test_a_file_without_a_checksum_is_damage_for_a_run_and_for_verify(tmp_path, name, capsys):
    module, optimizer = trained(1)
    for weight in module.parameters():
        optimizer.state[weight]["ema"] = weight.detach().clone()
    path = save(Checkpoints(tmp_path, keep=3), 1, module, optimizer)
    assert command(["verify", str(path)]) == 0
    sums = path / "SHA256SUMS"
    sums.write_text("".join(line for line in sums.read_text().splitlines(True) if name not in line))
    lines: list[str] = []
    with pytest.raises(CheckpointError, match="no checkpoint is whole"):
        Checkpoints(tmp_path, keep=3).newest(lines.append)
    capsys.readouterr()
    assert command(["verify", str(path)]) == 1
    assert all(f"SHA256SUMS has no checksum of {name}" in said for said in (capsys.readouterr().out, lines[0]))


def test_a_disk_that_fails_is_no_damage(tmp_path, monkeypatch):
    """Else the run would go on from the one before, and remove what it can no longer read."""
    for step in (1, 2):
        save(Checkpoints(tmp_path, keep=3), step, *trained(1))

    def fail(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(CheckpointError, match=r"step-00000002/state.json: Input/output error; put that right"):
        Checkpoints(tmp_path, keep=3).newest(pytest.fail)


def test_when_every_checkpoint_is_damaged_the_run_does_not_start_anew_by_itself(tmp_path):
    path = save(Checkpoints(tmp_path, keep=3), 1, *trained(1))
    (path / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint is whole; move the run directory away to start anew"):
        Checkpoints(tmp_path, keep=3).newest(lambda line: None)


def seal(path: Path) -> None:
    """Makes the checksums of a checkpoint right."""
    contents = ((name, (path / name).read_bytes()) for name in names(path) if name != "SHA256SUMS")
    lines = (f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in contents)
    (path / "SHA256SUMS").write_text("".join(lines))


WRONG = {
    "progress": [3, {"step": 2}, {"step": "2", "seen": 9}, {"step": 2, "seen": -1}, {"step": 1, "seen": 64}],
    "meters": [{}, [3], [{"loss": "0.1"}]],
    "scaling": [[], {"loss_scale": None}],
    "data": [7, None],
    "recipe": [[], "seed"],
}


def test_a_state_that_is_none_is_passed_over_though_its_checksum_is_right(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path, keep=3)
    path = [save(checkpoints, step, *trained(1)) for step in (1, 2)][1]
    right = json.loads((path / "state.json").read_text())
    changed = [json.dumps(right | {key: value}) for key, values in WRONG.items() for value in values]
    for content in [*changed, "3", "null", "[" * 100_000, "\0" * (2**26 + 1), "{}"]:
        (path / "state.json").write_text(content)
        seal(path)
        lines: list[str] = []
        assert checkpoints.newest(lines.append).progress.step == 1, content[:100]
        assert [line.startswith(f"{path}: not a whole checkpoint (") for line in lines] == [True]
    assert command(["inspect", str(tmp_path)]) == command(["verify", str(tmp_path)]) == 1
    capsys.readouterr()

    (path / "state.json").write_text(json.dumps(right))
    seal(path)
    assert checkpoints.newest(pytest.fail).progress.step == 2
    assert command(["verify", str(tmp_path)]) == 0
    sums = (path / "SHA256SUMS").read_text()
    for name in ("../step-00000001/state.json", "/etc/passwd", "..", ".", ""):
        (path / "SHA256SUMS").write_text(f"{sums}{'0' * 64}  {name}\n")
        assert checkpoints.newest(lambda line: None).progress.step == 1
        assert command(["verify", str(tmp_path)]) == 1


def test_a_checkpoint_of_a_later_program_is_refused_and_one_that_says_nothing_is_of_the_first(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    path = [save(checkpoints, step, *trained(1)) for step in (1, 2)][1]
    content = json.loads((path / "state.json").read_text())
    assert content.pop("format") == 1
    (path / "state.json").write_text(json.dumps(content))
    seal(path)
    assert checkpoints.newest(pytest.fail).progress.step == 2
    (path / "state.json").write_text(json.dumps(content | {"format": 2, "progress": "elsewhere"}))
    seal(path)
    with pytest.raises(CheckpointError, match="step-00000002: of format 2, this program reads 1: use the one that"):
        checkpoints.newest(pytest.fail)


def test_a_save_goes_on_beside_training_and_a_second_waits_for_it(tmp_path, monkeypatch):
    durable, sync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: durable.wait(60) and sync(handle))
    net = trained(1)
    with Writer(Checkpoints(tmp_path, keep=3).save, required=True, warn=pytest.fail) as writer:
        writer.save(state(1, *net))
        writer.look()
        assert not (tmp_path / "step-00000001").exists()
        threading.Timer(0.1, durable.set).start()
        writer.save(state(2, *net))
        assert (tmp_path / "step-00000001").exists()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_checkpoint_gets_its_name_when_its_bytes_are_on_the_disk_and_then_its_name_is_put_there(
    tmp_path, monkeypatch
):
    done, sync, rename = [], os.fsync, Path.rename

    def noted_sync(handle: int) -> None:
        done.append(os.path.relpath(Path(f"/proc/self/fd/{handle}").readlink(), tmp_path))
        sync(handle)

    def noted_rename(path: Path, to: Path) -> None:
        done.append(f"{path.name} -> {to.name}")
        rename(path, to)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(Path, "rename", noted_rename)
    for step in (1, 2):
        save(Checkpoints(tmp_path / "run" / "checkpoints", keep=1), step, *trained(1))
    files = ("weights.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS")
    drafts = [f".step-{step:08d}.draft" for step in (1, 2)]
    assert done == [
        *("run", *(f"run/checkpoints/{drafts[0]}/{name}" for name in files), f"run/checkpoints/{drafts[0]}"),
        *(f"{drafts[0]} -> step-00000001", "run/checkpoints"),
        *(*(f"run/checkpoints/{drafts[1]}/{name}" for name in files), f"run/checkpoints/{drafts[1]}"),
        *(f"{drafts[1]} -> step-00000002", "run/checkpoints", "step-00000001 -> .step-00000001.removed"),
    ]


@contextmanager
def refusing(reason: int, monkeypatch):
    """Where a file cannot be written for this reason."""

    def refuse(handle: int) -> None:
        raise OSError(reason, os.strerror(reason))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ExitStack() as undo:
        if reason == errno.EFBIG:
            undo.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        else:
            undo.enter_context(monkeypatch.context()).setattr(os, "fsync", refuse)
        yield


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        (errno.ENOSPC, "make room on this disk"),
        (errno.EDQUOT, "make room within your quota"),
        (errno.EFBIG, "this disk or `ulimit -f` allows no file of that size"),
        (errno.EIO, "the disk fails, have it looked at"),
        (errno.EROFS, "put that right"),
    ],
)
def test_what_the_disk_refuses_is_one_line_and_what_lay_there_stays(reason, advice, tmp_path, monkeypatch):
    checkpoints, net, said = Checkpoints(tmp_path, keep=1), trained(1), []
    save(checkpoints, 3, *net)
    lines = {
        step: f"{tmp_path}/.step-{step:08d}.draft/weights.safetensors: {os.strerror(reason)}: step {step} is not "
        f"saved, step-00000003 is the newest checkpoint; {advice}"
        for step in (4, 5, 6)
    }

    def saves(writer: Writer, *steps: int | None) -> None:
        with writer:
            for step in steps:
                writer.save(state(step, *net))  # None has no state

    with refusing(reason, monkeypatch):
        with pytest.raises(CheckpointError) as raised:
            saves(Writer(checkpoints.save, True, pytest.fail), 4, 5)
        assert str(raised.value) == f"{lines[4]}, then give the same command again"
        with pytest.raises(CheckpointError) as raised:
            saves(Writer(checkpoints.save, False, said.append), 4, 5)  # the last is required
        assert said == [f"{lines[4]}; training goes on"]
        with Writer(checkpoints.save, False, said.append) as writer:
            assert writer.wait()
            writer.save(state(4, *net))
            assert not writer.wait()
        assert said.pop() == said[0]
        assert str(raised.value) == f"{lines[5]}, then give the same command again"
        with pytest.raises(TypeError):
            saves(Writer(checkpoints.save, True, said.append), 6, None)
        assert said[1:] == [lines[6]]
    assert names(tmp_path) == ["step-00000003"]
    assert checkpoints.newest(pytest.fail).progress.step == 3
    save(checkpoints, 4, *net)
    assert names(tmp_path) == ["step-00000004"]


def test_inspect_and_verify_say_what_is_there_and_what_is_damaged(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=3)
    paths = [save(checkpoints, step, *trained(1)) for step in (1_000, 2_000, 3_000)]
    (checkpoints.directory / ".step-00004000.draft").mkdir()
    draft = f"{checkpoints.directory}/.step-00004000.draft: a draft: being written, or left by a run that died"

    def lines(*words: object) -> tuple[int, list[str]]:
        status = command([str(word) for word in words])
        return status, capsys.readouterr().out.splitlines()

    whole = [f"{path}: whole" for path in reversed(paths)]
    assert lines("verify", tmp_path) == lines("verify", checkpoints.directory) == (0, [*whole, draft])
    assert lines("verify", paths[0]) == (0, [f"{paths[0]}: whole"])
    status, said = lines("inspect", tmp_path)
    assert status == 0
    assert [line.split()[:3] for line in said[1:4]] == [
        [f"step-0000{step}", f"{step:,}", f"{64 * step:,}"] for step in (3000, 2000, 1000)
    ]
    assert [line.split() for line in said[5:-1]] == [
        ["step-00003000"],
        ["recipe", "seed=0"],
        ["data", "set", "digest"],
        *[[player, count, "weights", "in", "2", "tensors"] for player, count in (("0", "16"), ("1", "8"), ("2", "10"))],
        ["weights.safetensors:", "9", "tensors,", "8", "F32,", "1", "I64"],
        ["optimizer.safetensors:", "18", "tensors,", "18", "F32"],
    ]
    assert said[-1] == draft
    assert ["1.running_mean", "F32", "[4]"] in [line.split() for line in lines("inspect", "--tensors", paths[0])[1]]

    for path, name in (
        (paths[2], "weights.safetensors"),
        (paths[2], "state.json"),
        (paths[1], "optimizer.safetensors"),
    ):
        damaged = bytearray((path / name).read_bytes())
        damaged[-1] ^= 1
        (path / name).write_bytes(damaged)
    (paths[0] / "weights.safetensors").write_bytes(b"short")
    status, said = lines("verify", tmp_path)
    assert status == 1
    assert said[0].startswith(
        f"{paths[2]}: weights.safetensors: the checksum differs; state.json: the checksum differs"
    )
    assert said[1:3] == [
        f"{paths[1]}: optimizer.safetensors: the checksum differs",
        f"{paths[0]}: weights.safetensors: the checksum differs; not a whole checkpoint (SafetensorError: Error while "
        "deserializing header: header too small)",
    ]
    status, said = lines("inspect", tmp_path)
    assert status == 1
    assert "step-00002000" in said  # the newest whose state can be read
    assert command(["verify", str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err == (
        f"vaedist: {tmp_path}/nothing: no checkpoint; name a run, the checkpoints in it, or one of these\n"
    )
    assert command(["inspect", "x" * 300]) == 1
    assert capsys.readouterr().err == f"vaedist: {'x' * 100}: File name too long\n"


def test_the_commands_need_no_torch_and_end_quietly_when_nobody_reads_on(tmp_path):
    save(Checkpoints(tmp_path, keep=3), 1, *trained(1))
    words = ("-m", "vaedist.checkpoint", "inspect", tmp_path)
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGPIPE
    script = f"import sys, runpy; sys.modules['torch'] = None; sys.argv[1:] = ['verify', {str(tmp_path)!r}]"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; runpy.run_module('vaedist.checkpoint', run_name='__main__')"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}/step-00000001: whole\n", "")


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
    assert all(trial["weights"] == [trial["found"]] for trial in trials)
    assert any(trial["drafts"] for trial in trials)  # some of the kills did hit a write
