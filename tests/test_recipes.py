"""Every recipe in recipes/ parses, builds, and says how it is run."""

from pathlib import Path

import pytest

from vaedist.backend import Config as Train
from vaedist.config import ConfigError, component_name, dump
from vaedist.evaluate import recipe_of
from vaedist.recipe import RECIPES, load
from vaedist.words import is_setting
from vaedist.world import World

NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_parses_and_its_header_has_the_command(name):
    recipe, dry_run = load([f"recipe={name}"])
    assert not dry_run
    assert str(recipe.run) == f"runs/{name}"
    header = [line for line in (RECIPES / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert any(f"accelerate launch vaedist/train.py recipe={name}" in line for line in header)


@pytest.mark.parametrize("name", NAMES)
def test_a_resolved_recipe_reads_back_as_itself(name, tmp_path):
    recipe, _ = load([f"recipe={name}", "seed=3"])
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe))
    assert load([f"recipe={path}"])[0] == recipe


@pytest.mark.parametrize("name", [name for name in NAMES if name != "seed128"])
def test_a_recipe_builds_its_objective(name):
    recipe, _ = load([f"recipe={name}"])
    size = recipe.data.size
    objective = recipe.objective.build(recipe.model.build((3, size, size), World()), World(), 1000)
    optimizer = recipe.optimizer.build(objective.param_groups())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(objective.parameters()))


def test_factorvae_has_the_settings_of_its_paper():
    recipe, _ = load(["recipe=factorvae"])
    player = recipe.objective.discriminator
    assert (component_name(recipe.model), recipe.model.latent, recipe.model.hidden) == ("conv64", 10, 256)
    assert (recipe.objective.gamma, recipe.objective.likelihood) == (6.4, "bernoulli")
    assert (player.layers, player.width, player.lr, player.betas) == (6, 1000, 1e-5, (0.5, 0.9))
    assert (recipe.optimizer.lr, recipe.optimizer.betas) == (1e-4, (0.9, 0.999))
    assert (recipe.train.batch, recipe.train.steps, recipe.data.crop) == (64, 1_000_000, 148)


def test_the_recipes_of_dsprites_have_the_settings_of_their_papers():
    recipes = {name: load([f"recipe={name}"])[0] for name in ("dsprites", "dsprites_factorvae", "dsprites_betavae")}
    assert {(r.data.shards, r.data.crop, r.train.batch, r.model.latent) for r in recipes.values()} == {
        ("data/dsprites", None, 64, 10)
    }
    assert {r.objective.likelihood for r in recipes.values()} == {"bernoulli"}
    vae, factorvae, betavae = recipes.values()
    assert (component_name(vae.model), vae.optimizer.lr, vae.train.steps) == ("burgess64", 5e-4, 30 * 737_280 // 64)
    for other in (factorvae, betavae):
        assert (component_name(other.model), other.model.hidden) == ("conv64", 128)
        assert (other.optimizer.lr, other.train.steps) == (1e-4, 300_000)
    player = factorvae.objective.discriminator
    assert (player.layers, player.width, player.lr, player.betas) == (6, 1000, 1e-4, (0.5, 0.9))
    assert (factorvae.objective.gamma, betavae.objective.beta) == (35, 4)


def test_a_batch_that_does_not_divide_lists_the_numbers_of_processes_that_do():
    assert Train(batch=64, accumulate=2).local(4) == 8
    with pytest.raises(ConfigError, match=r"train.batch=12 .* on 5 processes: use processes in \{1, 2, 3, 6\}"):
        Train(batch=12, accumulate=2).local(5)
    with pytest.raises(ConfigError, match=r"use a train\.accumulate that divides it"):
        Train(batch=12, accumulate=5).local(1)


def test_the_run_directory_follows_from_the_command():
    def run(*words: str) -> str:
        return str(load(["recipe=factorvae", *words])[0].run)

    assert (
        run("seed=1", "objective.gamma=10")
        == run("objective.gamma=10", "seed=1")
        == "runs/factorvae,objective.gamma=10.0,seed=1"
    )
    assert run("objective.gamma=10") == run("objective.gamma=1e1") == "runs/factorvae,objective.gamma=10.0"
    assert run("objective=betavae") == "runs/factorvae,objective.name=betavae"
    assert (
        run("track.wandb=off", "data.store=tar", "train.steps=9", "train.accumulate=2", "debug.replicas=5")
        == "runs/factorvae"
    )
    assert run("train.precision=bf16") == "runs/factorvae,train.precision=bf16"
    assert run("run=elsewhere") == "elsewhere"
    assert run("objective={name: betavae, beta: 4}") == run("objective=betavae", "objective.beta=4")
    assert run("objective={name: betavae}", "objective.beta=4") == run("objective=betavae", "objective.beta=4")
    assert run("train={steps: 9, precision: bf16}", "track={wandb: off}") == run("train.precision=bf16")
    assert run("data.shards=/some where/set") == "runs/factorvae,data.shards=_some_where_set"
    many = [f"objective.discriminator.{key}={value}" for key, value in (("width", 10), ("layers", 3), ("lr", 1e-3))]
    assert len(run(*many, "optimizer.lr=1e-3", "train.batch=32", "train.steps=10")) < 140


def test_a_run_is_looked_at_with_other_evaluators_than_it_was_trained_with(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, _ = load(["recipe=vae", "evaluate.attributes=[Smiling]", "run=."])
    assert recipe.run == tmp_path
    Path("recipe.yaml").write_text(dump(recipe))
    for words in (["evaluate.names=[mig]"], ["evaluate.names=[]"]):
        found, _ = load(recipe_of(".", words))
        assert (found.evaluate.attributes, found.run) == (None, tmp_path)
    found, _ = load(recipe_of(".", ["evaluate.names=[attributes]"]))
    assert found.evaluate.attributes == ("Smiling",)


def test_a_run_is_told_from_a_setting():
    assert is_setting("train.steps=9")
    assert not any(map(is_setting, ("runs/vae,seed=1", "./vae,seed=1", "/runs/vae", ".")))
