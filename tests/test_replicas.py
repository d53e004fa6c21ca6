"""Several runs at once in one process: each is the run trained alone, in its own directory."""

import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import cases
import pytest
import torch
import yaml
from damage import flip
from safetensors.torch import load_file
from small import ROWS, SHAPE, STEP, micro_batches, small
from tiny_model import Config as Tiny
from wandb_records import logged

from launch.slurm.check import check, recipes_of, settled
from vaedist import backend
from vaedist.checkpoint import CheckpointError, Checkpoints, Progress, State
from vaedist.config import ConfigError, available
from vaedist.debug import DivergedError
from vaedist.noise import Noise
from vaedist.objectives.factorvae import Discriminator, FactorVAE
from vaedist.recipe import load, load_all
from vaedist.replicas.backend import ReplicaBackend
from vaedist.replicas.files import newest_common, save_all
from vaedist.replicas.objective import ReplicaNoise, Replicas
from vaedist.replicas.run import train_replicas
from vaedist.stop import Stop, StoppedError
from vaedist.watch import TorchError
from vaedist.world import World

SEEDS = 5, 6, 9
OWN = {  # what the replicas of an objective differ in; nothing that is not named here but weights and noise
    "annealedvae": {"gamma": (1.0, 10.0, 100.0)},
    "betatcvae": {"alpha": (1.0, 2.0, 0.5), "beta": (1.0, 6.0, 3.0), "gamma": (1.0, 2.0, 1.0)},
    "betavae": {"beta": (1.0, 4.0, 16.0)},
    "constrainedvae": {"bound": (1.0, 20.0, 30.0), "rate": (1e-2, 1e-3, 1e-2), "multiplier": (1.0, 2.0, 0.5)},
    "dipvae": {"lambda_od": (1.0, 10.0, 5.0)},  # and lambda_d, which follows from it
    "factorvae": {"gamma": (1.0, 6.4, 40.0)},
    "infovae": {"alpha": (0.0, 0.5, -1.0), "lambda_mmd": (10.0, 1.0, 100.0), "bandwidth": (1.0, 2.0, 5.0)},
    "qlae": {"lambda_quantize": (1.0, 2.0, 3.0), "lambda_commit": (3.0, 2.0, 1.0)},
    "vae": {"likelihood": ("gaussian",) * 3, "scale": (0.5, 1.0, 2.0)},
}


def objective(name: str, network: str, number: int):
    """Of a replica, with weights of its own."""
    settings = {key: values[number] for key, values in OWN.get(name, {}).items()}
    if name == "factorvae":
        settings["discriminator"] = Discriminator(layers=2, width=20)
    found, generator = small(name, network, **settings), torch.Generator().manual_seed(number)
    for weight in found.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return found


@pytest.mark.parametrize(
    ("name", "network"),
    [
        *((name, "plain") for name in available("vaedist.objectives")),
        ("factorvae", "dropout"),
        ("factorvae", "batch norm"),
    ],
)
def test_a_step_of_replicas_is_the_step_of_each_alone(name, network):
    """Terms, report, gradients, and what the step leaves in the buffers."""
    replicas = Replicas([objective(name, network, number) for number in range(3)], torch.device("cpu"))
    ((_, noise),) = micro_batches(replicas.streams)
    images = torch.rand(3, replicas.streams, ROWS, *SHAPE, dtype=torch.float64)
    together = ReplicaNoise(SEEDS, noise.positions, replicas.which)
    with torch.no_grad():
        (surveyed,), report = replicas.survey([(images, together)], STEP), replicas.latents([(images, together)])
    terms = replicas(images, together, STEP, surveyed)
    terms["loss"].sum().backward()
    replicas.after_step({key: term.detach() for key, term in terms.items()})
    gradients = {key: own for player in replicas.players for key, own in player.cut(player.rows.grad).items()}

    def close(found, expected):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item(), equal_nan=True)

    for number, seed in enumerate(SEEDS):
        alone, micros = objective(name, network, number), [(images[number], Noise(seed, noise.positions))]
        with torch.no_grad():
            (surveyed,), expected = alone.survey(micros, STEP), alone.latents(micros)
        for key, value in expected.items():
            close(report[key][number], value)
        expected = alone(*micros[0], STEP, surveyed)
        expected["loss"].backward()
        alone.after_step({key: term.detach() for key, term in expected.items()})
        assert terms.keys() == expected.keys()
        for key, value in expected.items():
            close(terms[key][number].detach(), value.detach())
        for key, weight in alone.named_parameters():
            close(gradients[key][number], weight.grad)
        for (key, buffer), view in zip(alone.named_buffers(), replicas.each[number].buffers(), strict=True):
            close(replicas.buffers[key][number], buffer)
            close(view, buffer)


SETTINGS = {
    "train_precision": "fp64",
    "train_steps": 4,
    "train_clip": 500,
    "train_ema": 0.9,
    "checkpoint_every": 2,
    "evaluate_every": 4,
    "objective_gamma": "[10,20,40]",
    "objective_discriminator.lr": "[1e-5,1e-3,1e-3]",
    "optimizer_lr": "[5e-4,5e-4,1e-3]",
}


def at_once(data: Path, runs: list[Path], **more: object) -> None:
    """Trains a FactorVAE for each directory, the first of those that SETTINGS speak of."""
    lists = {key: value.strip("[]").split(",") for key, value in SETTINGS.items() if "[" in str(value)}
    own = {key: f"[{','.join(values[: len(runs)])}]" for key, values in lists.items()}
    settings = SETTINGS | own | {"train_replicas": len(runs)} | more
    words = cases.words("factorvae", data, f"[{','.join(map(str, runs))}]", **settings)
    recipes = [replace(recipe, model=Tiny()) for recipe in load_all(words)[0]]
    train_replicas(recipes, ReplicaBackend(recipes[0].train), Stop())


def alone(data: Path, run: Path, number: int, **more: object) -> None:
    """Trains the one that is replica `number`."""
    items = {key: str(value).strip("[]").split(",") for key, value in SETTINGS.items()}
    own = {key: values[number % len(values)] for key, values in items.items()}
    cases.run("factorvae", data, run, seed=number, **own | more)


def assert_same(run: Path, other: Path) -> None:
    """Rows, weights, averaged weights and moments."""
    for one, two in zip(cases.rows(run), cases.rows(other), strict=True):
        assert one.keys() == two.keys()
        kept = [key for key in one if not key.startswith("perf/")]
        assert [one[key] for key in kept] == pytest.approx([two[key] for key in kept], rel=1e-9)
    last = "checkpoints/step-00000004"
    for file in ("weights", "averaged", "optimizer"):
        one, two = (load_file(at / last / f"{file}.safetensors") for at in (run, other))
        assert one.keys() == two.keys()
        for key, value in two.items():
            torch.testing.assert_close(one[key], value, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> list[Path]:
    runs = [tmp_path_factory.mktemp("replicas") / name for name in "abc"]
    at_once(data, runs)
    return runs


def test_replicas_leave_what_the_same_runs_leave_alone(data, trained, tmp_path):
    for number, run in enumerate(trained):
        alone(data, other := tmp_path / run.name, number)
        assert_same(run, other)
        said = [(at / "recipe.yaml").read_text().replace(str(at), "") for at in (run, other)]
        assert said[0] == said[1]
        assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in other.iterdir())
    recipes = [yaml.safe_load((run / "recipe.yaml").read_text()) for run in trained]
    assert [recipe["objective"]["gamma"] for recipe in recipes] == [10, 20, 40]


def copies(runs: list[Path], directory: Path) -> list[Path]:
    return [shutil.copytree(run, directory / run.name) for run in runs]


def test_a_replica_goes_on_alone(data, trained, tmp_path):
    (run,) = copies(trained[1:2], tmp_path)
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    alone(data, run, 1)
    assert_same(run, trained[1])


def test_replicas_go_on_together_from_the_newest_step_that_all_have_whole(data, trained, tmp_path, capsys):
    runs = copies(trained, tmp_path)
    flip(runs[1] / "checkpoints" / "step-00000004" / "weights.safetensors", at=-9)
    shutil.rmtree(runs[2] / "checkpoints" / "step-00000004")
    at_once(data, runs)
    said = capsys.readouterr().out
    assert f"step 2 is the newest that all replicas have whole: back to it go {runs[0]}, {runs[1]}\n" in said
    assert "3 replicas: resumed at step 2\n" in said
    for run, other in zip(runs, trained, strict=True):
        assert_same(run, other)
    shutil.rmtree(runs[2] / "checkpoints")
    with pytest.raises(CheckpointError, match=r"c/checkpoints: there is no step of which this and all other replicas"):
        at_once(data, runs)


@pytest.mark.parametrize("end", [CheckpointError, KeyboardInterrupt])
def test_a_step_that_all_have_stays_when_one_cannot_be_saved_or_the_process_is_killed(end, tmp_path, monkeypatch):
    recipes = load_all(["recipe=vae", "train.replicas=3"])[0]
    places = [Checkpoints(tmp_path / name, keep=1) for name in "abc"]
    write = Checkpoints.write

    def save(step: int) -> None:
        state = State(
            progress=Progress(step, step), meters=[{"loss": [1.0, 2.0, 3.0]}], scaling={}, data="digest", recipe={},
            weights={"w": torch.arange(3.0)}, moments={"w/step": torch.arange(3.0)},
        )  # fmt: skip
        save_all(places, recipes, state)

    def fail(checkpoints: Checkpoints, state: State) -> Path:
        if checkpoints is places[1]:
            raise end
        return write(checkpoints, state)

    save(4)
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "write", fail)
        for step in (8, 12):
            with pytest.raises(end):
                save(step)
    others = {4, 12} if end is CheckpointError else {4, 8, 12}
    assert [each.steps() for each in places] == [others, {4}, {4, 12} if end is CheckpointError else {4}]
    said: list[str] = []
    found = newest_common(places, said.append)
    assert [(each.progress.step, float(each.weights["w"]), each.meters) for each in found] == [
        (4, 0.0, [{"loss": 1.0}]), (4, 1.0, [{"loss": 2.0}]), (4, 2.0, [{"loss": 3.0}])
    ]  # fmt: skip
    assert len(said) == 1
    save(8)
    assert [each.steps() for each in places] == [{8}] * 3


def test_replicas_that_have_all_their_steps_leave_one_alone_that_went_on(data, trained, tmp_path):
    runs = copies(trained, tmp_path)
    for run in runs:
        (run / "COMPLETE").unlink()
    alone(data, runs[0], 0, train_steps=6)
    (runs[0] / "COMPLETE").unlink()
    before = cases.rows(runs[0])
    at_once(data, runs)
    assert cases.rows(runs[0]) == before
    assert [(run / "COMPLETE").exists() for run in runs] == [False, True, True]


def test_a_file_in_the_directory_of_one_stops_all_saved(data, tmp_path):
    runs = [tmp_path / name for name in "ab"]
    runs[1].mkdir()
    (runs[1] / "STOP").touch()
    with pytest.raises(StoppedError, match="at step 1 by the file STOP"):
        at_once(data, runs)
    assert not (runs[1] / "STOP").exists()
    assert all((run / "checkpoints" / "step-00000001").exists() for run in runs)


def test_a_replica_that_diverges_is_named(data, tmp_path):
    with pytest.raises(DivergedError, match=r"^step \d: .* of replica 1=.* without that replica the others go on"):
        at_once(data, [tmp_path / "a", tmp_path / "b"], train_precision="fp32", optimizer_lr="[5e-4,1e30]")


def test_an_objective_that_asks_for_the_value_of_a_number_is_refused_with_its_line(data, tmp_path):
    def recon(self, *arguments):
        return 0 * self.gamma if self.gamma > 15 else self.gamma

    with (
        patch.object(FactorVAE, "recon", recon),
        pytest.raises(TorchError, match=r"^step 1: train\.replicas: vmap: .* control flow.*factorvae\.py:\d+ in _elbo"),
    ):
        at_once(data, [tmp_path / "a", tmp_path / "b"])


def runs(*words: str) -> list[str]:
    return [str(recipe.run) for recipe in load_all(["recipe=factorvae", *words])[0]]


def test_the_directories_are_those_that_the_commands_for_each_alone_would_choose():
    assert runs("train.replicas=2") == ["runs/factorvae,seed=0", "runs/factorvae,seed=1"]
    assert runs("train.replicas=2", "seed=7", "optimizer.betas=[0.5,0.9]", "train.steps=9") == [
        str(load(["recipe=factorvae", f"seed={seed}", "optimizer.betas=[0.5,0.9]"])[0].run) for seed in (7, 8)
    ]
    gammas = runs("train.replicas=3", "seed=[4,4,5]", "objective.gamma=[10,2e1,10]")
    assert gammas == [
        str(load(["recipe=factorvae", f"seed={seed}", f"objective.gamma={gamma}"])[0].run)
        for seed, gamma in ((4, 10), (4, 20), (5, 10))
    ]
    assert runs("train.replicas=2", "run=[a,b]") == ["a", "b"]
    assert load_all(["recipe=factorvae", "train.replicas=2"])[0][1] == load(["recipe=factorvae", "seed=1"])[0]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("objective.gamma=[1,2,3]", "command line: objective.gamma=[1, 2, 3] has 3 values for train.replicas=2"),
        ("objective.gamma=[1,-2]", "command line: objective.gamma=[1, -2] is out of range: it must be at least 0"),
        ("objective.gamma=[1,x]", "command line: objective.gamma=x is not a finite number"),
        ("train.batch=[8,16]", "command line: train.batch is 8 and 16: replicas may differ in the seed and in numbers"),
        ("seed=[3,3]", "runs/factorvae,seed=3: 2 replicas would write there"),
        ("run=x", "x: 2 replicas would write there"),
        ("run=[]", "command line: run=[] has 0 values for one replica at least"),
        ("train.precision=fp16", "command line: train: replicas=2 goes with precision=bf16 or fp32"),
        ("train.compile=true", "command line: train: replicas=2 goes with compile=false"),
        ("train.accumulate=2", "command line: train: replicas=2 goes with accumulate=1: say fewer replicas"),
        ("train.engine=deepspeed", "command line: train: replicas=2 goes with engine=ddp"),
    ],
)
def test_what_replicas_cannot_do_is_answered_with_one_line(words, line):
    with pytest.raises(ConfigError) as caught:
        runs("train.replicas=2", words)
    assert str(caught.value).startswith(line)


def test_how_many_replicas_is_no_list():
    with pytest.raises(ConfigError, match=r"train\.replicas is a list: say how many"):
        runs("train.replicas=[2,5]")


def test_other_commands_and_several_processes_refuse_replicas(monkeypatch):
    with pytest.raises(ConfigError, match=r"train\.replicas=2 is for training; this is about one run"):
        load(["recipe=factorvae", "train.replicas=2"])
    monkeypatch.setattr(backend.Backend, "__init__", lambda self, _: vars(self).update(world=World(0, 2), _stage=None))
    monkeypatch.setattr(backend.Backend, "describe", lambda self: "2 processes")
    with pytest.raises(ConfigError, match=r"train\.replicas is for one process without DeepSpeed, not 2 processes"):
        ReplicaBackend(backend.Config())


def test_batches_whose_pairs_are_computed_in_parts_are_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.batch=656: replicas with 10 latents take at most 647 images"):
        at_once(data, [tmp_path / "a", tmp_path / "b", tmp_path / "c"], train_batch=656)


def test_a_job_names_the_directories_of_all_replicas_and_wants_one_process():
    words = ["recipe=factorvae", "train.replicas=2", "seed=3"]
    recipes = recipes_of(words)
    assert load_all(settled(words, recipes))[0] == recipes
    with pytest.raises(ConfigError, match=r"train\.replicas=2 is for one process, not 4: ask for one GPU"):
        check(recipes, 4, print)


@pytest.mark.slow
def test_every_replica_is_a_run_on_wandb(data, tmp_path):
    directories = [tmp_path / name for name in "abc"]
    at_once(data, directories, track_wandb="offline")
    found = [logged(run) for run in directories]
    assert [segment.config["objective.gamma"] for (segment,) in found] == [10, 20, 40]
    assert len({segment.id for (segment,) in found}) == 3
    for run, (segment,) in zip(directories, found, strict=True):
        losses = [row["train/loss"] for row in segment.rows if "train/loss" in row]
        assert losses == [row["train/loss"] for row in cases.rows(run)]
        assert segment.exit_code == 0
