"""What the debug switches show and refuse, and how torch's errors read."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import cases
import pytest
import switches
import torch
from launching import complaints, launch
from test_world_size import loss_distance

from vaedist.backend import Backend
from vaedist.config import ConfigError
from vaedist.objectives import Objective
from vaedist.recipe import load
from vaedist.train import main
from vaedist.watch import SETTLE, TorchError

# Two processes


@pytest.fixture(scope="module")
def launched(data, tmp_path_factory) -> tuple[Path, dict, str]:
    """What switches.py left, its report, and what the command complained of."""
    out = tmp_path_factory.mktemp("switches")
    done = launch(data, out, processes=2, script=Path(switches.__file__), timeout=600)
    assert (out / "found.json").exists(), done.stderr[-3000:]
    found = json.loads((out / "found.json").read_text())
    assert found["world_size"] == 2
    assert done.returncode != 0
    return out, found, done.stderr


@pytest.mark.slow
def test_two_processes_compile_once_and_reach_the_golden_losses(launched):
    """The rows of both ranks are gathered within the graph."""
    out, found, _ = launched
    assert found["graphs"] == [1, 1]
    assert loss_distance(out / "compiled", "betatcvae") <= 1e-4


@pytest.mark.slow
def test_every_rank_leaves_a_trace_of_the_steps_asked_for(launched):
    """A file that Chrome's format is: a list of named events with times."""
    out, *_ = launched
    directory, step = out / "watched" / "profile", SETTLE + switches.PROFILED
    assert sorted(path.name for path in directory.iterdir()) == [
        f"step-{step:08d}-rank{rank}.json.gz" for rank in range(2)
    ]
    for path in directory.iterdir():
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = Counter(event["name"] for event in events if event.get("ph") == "X")
        assert [names[f"ProfilerStep#{number}"] for number in range(SETTLE - 1, step + 1)] == [0, 1, 1, 0]
        assert names["Optimizer.step#AdamW.step"] == switches.PROFILED
        assert names["aten::convolution_backward"] > 0


@pytest.mark.slow
def test_every_row_has_the_memory_of_the_rank_that_takes_most(launched):
    out, *_ = launched
    peaks = [row["perf/memory_gb"] for row in cases.rows(out / "watched")]
    assert 0.1 < peaks[0] <= peaks[-1] < 10
    assert peaks == sorted(peaks)
    assert "perf/memory_gb" not in cases.rows(out / "compiled")[0]


@pytest.mark.slow
def test_a_watched_run_is_the_same_run(launched):
    out, *_ = launched
    assert loss_distance(out / "watched", "factorvae") <= 1e-4


@pytest.mark.slow
def test_a_nan_of_one_rank_in_a_backward_pass_ends_both_and_its_operation_is_named(launched):
    out, _, errors = launched
    (said,) = complaints(errors)
    assert said.startswith(
        "vaedist: step 4: SqrtBackward0 gave a gradient with NaN, at vaedist/objectives/__init__.py:"
    )
    assert not (out / "anomaly" / "checkpoints").exists()


# One process


def test_an_operation_without_a_deterministic_version_is_named(data, tmp_path, monkeypatch):
    recon = Objective.recon

    def scattered(self, z, images, noise):
        return recon(self, z.clone().put_(torch.tensor([0]), z.new_ones(1)), images, noise)

    monkeypatch.setattr(Objective, "recon", scattered)
    cases.run("vae", data, tmp_path / "without", train_steps=1, evaluate_names="[]")
    with pytest.raises(
        TorchError, match=r"^step 1: put_ does not have a deterministic implementation on this device; "
    ):
        cases.run("vae", data, tmp_path / "with", debug_deterministic="true")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_full_device_is_one_line_with_what_to_change(data, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 8 GiB.\nSee docs.")

    monkeypatch.setattr(Objective, "recon", full)
    with pytest.raises(TorchError) as caught:
        cases.run("vae", data, tmp_path, train_accumulate=2)
    assert str(caught.value) == (
        "step 1: CUDA out of memory. Tried to allocate 9 GiB; train.accumulate=4, now 2, makes the same run of half as "
        "many images at a time, and evaluations take less with a smaller evaluate.batch"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA error: out of memory\nSearch for"), "CUDA error: out of memory"),
        (
            RuntimeError(
                "[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: you tried. Error code 12"
            ),
            "DefaultCPUAllocator: can't allocate memory: you tried",
        ),
        (MemoryError("Unable to allocate 7.11 PiB for an array"), "Unable to allocate 7.11 PiB for an array"),
        (MemoryError(), "out of memory"),
    ],
)
def test_whatever_says_that_memory_is_full_is_one_line(error, said, data, tmp_path, monkeypatch):
    def full(*_):
        raise error

    monkeypatch.setattr(Objective, "recon", full)
    with pytest.raises(TorchError, match=f"^step 1: {said}; train.accumulate=2, now 1"):
        cases.run("vae", data, tmp_path)
    monkeypatch.setattr(Backend, "prepare", full)
    with pytest.raises(TorchError, match=f"^before the first step: {said}; make room on this device"):
        cases.run("vae", data, tmp_path)


def test_a_model_that_no_memory_holds_is_one_line(data, tmp_path, capsys):
    """Truly allocated: more than a process can address."""
    assert main(cases.words("conv64", data, tmp_path, model_hidden=10**12)) == 1
    (said,) = complaints(capsys.readouterr().err)
    assert re.match(
        r"vaedist: before the first step: DefaultCPUAllocator: can't allocate memory: you tried to allocate \d{16} "
        "bytes; make room on this device, or train a smaller model",
        said,
    )


def test_a_run_too_short_for_a_trace_says_so_and_tf32_on_a_cpu_that_it_does_nothing(data, tmp_path, capsys):
    cases.run("vae", data, tmp_path, train_steps=3, debug_profile=1, train_tf32="true", evaluate_names="[]")
    said = capsys.readouterr().out.splitlines()
    assert "train.tf32=true has no effect on 1 process on CPU" in said
    assert f"debug.profile: no trace, the run ended within the {SETTLE} steps that go before it" in said
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"debug_anomaly": "true", "train_compile": "true"}, "debug.anomaly=true looks for an operation"),
        ({"train_tf32": "true", "train_precision": "fp64"}, "tf32=true is about float32"),
        ({"debug_profile": "-1"}, "debug.profile=-1 is out of range"),
    ],
)
def test_switches_that_cannot_work_are_refused(more, line, data, tmp_path):
    with pytest.raises(ConfigError, match=line):
        load(cases.words("vae", data, tmp_path, **more))


def test_a_switch_that_only_looks_keeps_the_run_directory_and_tf32_makes_another():
    def named(*words: str) -> str:
        return load(["recipe=vae", *words])[0].run.name

    looking = "debug.memory=true", "debug.deterministic=true"
    assert named("train.compile=true", "train.capture=false", *looking) == "vae"
    assert named("train.tf32=true") == "vae,train.tf32=true"
