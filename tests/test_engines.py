"""DeepSpeed's ZeRO takes DDP's steps: every objective, every stage, and a run that moves between engines and ranks."""

import json
from pathlib import Path

import cases
import engines
import pytest
import torch
from engines import EXTRAS, HALVES, STAGES, half
from launching import launch
from safetensors.torch import load_file
from test_world_size import loss_distance, relative, steps

from vaedist.backend import Backend, Config
from vaedist.config import ConfigError

WORKER = Path(__file__).with_name("engines.py")
TOLERANCE = 1e-4
WHERE = [
    pytest.param(size, stage, marks=() if size == 2 else pytest.mark.slow) for size in (1, 2, 4) for stage in STAGES
]


@pytest.fixture(scope="module")
def ddp(data, tmp_path_factory) -> Path:
    """What DDP makes of factorvae and of the extras, on one process."""
    out = tmp_path_factory.mktemp("ddp")
    for name, more in {"whole": {}, **EXTRAS}.items():
        engines.run("factorvae", data, out / name, **more)
    return out


class Made(dict[int | str, Path]):
    """The directories of what engines.py made on 1, 2 and 4 processes, of half runs of others too; `more` is on two.

    Two processes go on with what DDP has saved, one and four with what another stage has on two.
    """

    def __init__(self, data: Path, ddp: Path, place: Path) -> None:
        self.data, self.ddp, self.place = data, ddp, place

    def __missing__(self, key: int | str) -> Path:
        directory = self.place / str(key)
        size, words = (2, ["more"]) if key == "more" else (int(key), [])
        for stage in STAGES if key != "more" else []:
            source = self.ddp / "whole" if size == 2 else self[2] / f"whole-{(stage + 1) % len(STAGES)}"
            half(source, directory / f"moved-{stage}")
        done = launch(self.data, directory, *words, processes=size if size > 1 else None, script=WORKER, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads((directory / "found.json").read_text())["world_size"] == size
        self[key] = directory
        return directory


@pytest.fixture(scope="module")
def zero(data, ddp, tmp_path_factory) -> Made:
    return Made(data, ddp, tmp_path_factory.mktemp("zero"))


def tensors(run: Path, step: int, file: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08d}" / f"{file}.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "halves"), HALVES)
def test_every_objective_reaches_the_golden_losses_of_ddp_under_every_stage_and_accumulation(case, halves, zero):
    directory = zero["more"] / f"{case}-{halves}"
    assert len(cases.rows(directory)) == steps(case)
    assert loss_distance(directory, case) <= TOLERANCE


@pytest.mark.parametrize(("size", "stage"), WHERE)
def test_any_number_of_processes_goes_on_with_what_others_have_saved(size, stage, zero):
    for name in ("whole", "moved"):
        assert len(cases.rows(zero[size] / f"{name}-{stage}")) == steps("factorvae")
        assert loss_distance(zero[size] / f"{name}-{stage}", "factorvae") <= TOLERANCE


@pytest.mark.parametrize(("size", "stage"), WHERE)
def test_ddp_goes_on_with_what_any_number_of_processes_has_saved(size, stage, zero, data, tmp_path):
    half(zero[size] / f"whole-{stage}", tmp_path)
    engines.run("factorvae", data, tmp_path)
    assert loss_distance(tmp_path, "factorvae") <= TOLERANCE


@pytest.mark.parametrize(("size", "stage"), WHERE)
def test_a_checkpoint_does_not_tell_who_has_saved_it(size, stage, zero, ddp):
    for file in ("weights", "optimizer"):
        ours, theirs = tensors(zero[size] / f"whole-{stage}", 6, file), tensors(ddp / "whole", 6, file)
        assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4 * tensor.abs().max().item(), msg=name)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("size", "name"), [(2, "whole"), pytest.param(1, "fp16", marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_same_bit_for_bit(size, name, stage, zero):
    resumed, whole = zero[size] / f"{name}-again-{stage}", zero[size] / f"{name}-{stage}"
    assert cases.terms(resumed) == cases.terms(whole)
    files = ("weights", "optimizer", "averaged") if name == "fp16" else ("weights", "optimizer")
    for file in files:
        ours, theirs = tensors(resumed, 12, file), tensors(whole, 12, file)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("extra", EXTRAS)
def test_clipping_averaging_and_precision_mean_what_they_mean_under_ddp(extra, stage, zero, ddp):
    ours, theirs = cases.rows(zero[1 if extra == "fp16" else "more"] / f"{extra}-{stage}"), cases.rows(ddp / extra)
    for name in ("train/loss", "eval/elbo", "train/loss_scale", "train/skipped_steps"):
        found, right = ([row[name] for row in rows if name in row] for rows in (ours, theirs))
        assert len(found) == len(right)
        assert not right or relative(found, right) <= TOLERANCE
    if extra == "fp16":
        assert 0 < theirs[-1]["train/skipped_steps"] < len(theirs) / 2
    else:  # it does something
        assert theirs[-1]["eval/elbo"] != cases.rows(ddp / "whole")[-1]["eval/elbo"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("extra", ["ema", "fp16"])
def test_a_checkpoint_has_the_averaged_weights_that_were_looked_at(extra, stage, zero, ddp):
    run = zero[1 if extra == "fp16" else "more"] / f"{extra}-{stage}"
    ours, theirs = tensors(run, 12, "averaged"), tensors(ddp / extra, 12, "averaged")
    weights = tensors(ddp / extra, 12, "weights")
    assert ours.keys() == theirs.keys() == weights.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4 * tensor.abs().max().item(), msg=name)
        assert not torch.equal(tensor, weights[name])


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES[1:])
def test_the_optimisers_state_may_lie_in_the_memory_of_the_host(stage, zero):
    assert loss_distance(zero["more"] / f"offload-{stage}", "factorvae") <= TOLERANCE


@pytest.mark.slow
def test_gradients_that_are_no_numbers_end_a_run_that_deepspeed_would_go_on_with(zero):
    diverged = json.loads((zero["more"] / "found.json").read_text())["diverged"]
    assert len(diverged) == len(STAGES[1:])
    for line in diverged:
        assert line.startswith("DivergedError: step 3: the gradients are not finite; nothing of this step was saved")


@pytest.mark.parametrize("settings", [{"zero_stage": 2}, {"engine": "ddp", "offload_optimizer": "cpu"}])
def test_what_belongs_to_deepspeed_is_refused_without_it(settings):
    with pytest.raises(ValueError, match="belongs to engine=deepspeed"):
        Config(**settings)


@pytest.mark.parametrize(
    ("said", "settings", "line"),
    [
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, {}, "names a deepspeed_config_file"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "1.0"}, {}, "say train.clip instead"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, {}, "offloads to nvme"),
        ({}, {"zero_stage": 0, "offload_optimizer": "cpu"}, "needs train.zero_stage=1, 2 or 3"),
        ({}, {"zero_stage": 2, "offload_param": "cpu"}, "needs train.zero_stage=3"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, {"compile": True}, "cannot follow ZeRO-3"),
        ({}, {"precision": "fp64"}, "use train.engine=ddp"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {"engine": "ddp"}, "give up one of them"),
        ({"ACCELERATE_USE_CPU": "True"}, {}, "leave out --cpu"),
    ],
)
def test_what_an_engine_would_leave_out_without_a_word_is_refused(said, settings, line, monkeypatch):
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "")  # as they were, whatever a process that goes on for long would set
        monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match=line):
        Backend(Config(**{"engine": "deepspeed"} | settings))


def test_the_environment_does_not_change_how_a_step_accumulates(data, tmp_path, ddp, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    engines.run("factorvae", data, tmp_path)
    assert cases.terms(tmp_path) == cases.terms(ddp / "whole")
