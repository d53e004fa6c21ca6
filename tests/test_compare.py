"""`python -m vaedist.compare`: what differs, numbers over seeds, and what it says of runs that are not whole."""

import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import some_runs

from vaedist.compare.__main__ import main
from vaedist.compare.comparison import APART, GROUND, Comparison
from vaedist.compare.metrics import Spread, direction
from vaedist.compare.runs import Point, read
from vaedist.config import flatten
from vaedist.recipe import Recipe, as_dict

ROOT = Path(__file__).resolve().parents[1]
ELBOS = [[-30.0, -20.0, -21.0], [-31.0, -22.0, -24.0], [-32.0, -25.0, -27.0]]


@pytest.fixture
def seeds(tmp_path):
    """Three runs that differ in their seed, and one with another beta."""
    runs = [some_runs.write(tmp_path / f"seed={n}", {"eval/elbo": elbo}, seed=n) for n, elbo in enumerate(ELBOS)]
    return [*runs, some_runs.write(tmp_path / "beta=8", {"eval/elbo": [-40.0, -39.0, -38.5]}, objective__beta=8.0)]


def compared(runs):
    return Comparison([read(run) for run in runs])


def test_runs_that_differ_only_in_their_seed_are_one_configuration_with_mean_deviation_and_n(seeds):
    three, one = compared(seeds).configurations
    last = [elbo[-1] for elbo in ELBOS]
    assert three.final("eval/elbo") == Spread(statistics.mean(last), statistics.stdev(last), 3, (30,))
    assert one.final("eval/elbo") == Spread(-38.5, None, 1, (30,))
    assert str(three.final("eval/elbo")) == "-24.0 ± 3.0"
    assert str(one.final("eval/elbo")) == "-38.5"


def test_the_best_of_each_run_counts_wherever_it_is(seeds):
    three, one = compared(seeds).configurations
    assert three.best("eval/elbo") == Spread(
        statistics.mean([-20, -22, -25]), statistics.stdev([-20, -22, -25]), 3, (20,)
    )
    assert one.best("eval/elbo").steps == (30,)


def test_the_mean_curve_is_that_of_the_runs_at_the_same_images(seeds):
    assert compared(seeds).configurations[0].mean("eval/elbo")[0] == (80, statistics.mean([-30, -31, -32]))


@pytest.mark.parametrize(
    ("expected", "metrics"),
    [
        (1, ["eval/elbo", "eval/mig", "eval/psnr", "eval/factorvae_metric", "eval/dci_completeness"]),
        (-1, ["eval/recon", "eval/fid", "eval/lpips"]),
        (0, ["eval/kl", "latent/tc", "train/loss"]),
    ],
)
def test_a_metric_is_better_upwards_downwards_or_neither(expected, metrics):
    assert {direction(metric) for metric in metrics} == {expected}


def test_what_differs_is_said_and_only_that(tmp_path):
    a = some_runs.write(tmp_path / "a", {}, track__project="q", data__cache="/scratch", seed=1)
    b = some_runs.write(tmp_path / "b", {}, evaluate__every=5, optimizer__betas=[0.5, 0.999])
    c = some_runs.write(tmp_path / "c", {}, objective={"name": "vae", "likelihood": "bernoulli"})
    comparison = compared([a, b, c])
    assert comparison.keys == ["objective.name", "objective.beta", "optimizer.betas"]
    assert comparison.configurations[1].said == {
        "objective.name": "betavae", "objective.beta": "4", "optimizer.betas": "[0.5, 0.999]"
    }  # fmt: skip
    assert comparison.configurations[2].label == "3: objective=vae optimizer.betas=[0.9, 0.999]"


def test_a_data_set_is_its_digest_wherever_it_lies(tmp_path):
    a = some_runs.write(tmp_path / "a", {})
    moved = some_runs.write(tmp_path / "b", {}, data__shards="/elsewhere")
    other = some_runs.write(tmp_path / "c", {}, data="e" * 64)
    assert compared([a, moved]).keys == []
    comparison = compared([a, moved, other])
    assert [one.said for one in comparison.configurations] == [
        {"data.shards": "data/x"}, {"data.shards": "data/x (eeeeeeee)"}
    ]  # fmt: skip


def test_an_option_younger_than_a_run_is_no_difference(tmp_path):
    old, new = some_runs.write(tmp_path / "a", {}), some_runs.write(tmp_path / "b", {}, train__tf32=False)
    assert compared([old, new]).keys == []


def test_the_keys_with_a_meaning_here_are_keys_of_a_recipe():
    known = [*flatten(as_dict(Recipe()))]
    assert [key for key in (*APART, *GROUND) if not any(name.startswith(key) for name in known)] == []
    assert [name for name in known if name.startswith("evaluate.") and not name.startswith((*APART, *GROUND))] == []


def test_the_best_is_marked_where_the_numbers_compare(seeds, tmp_path):
    assert compared(seeds).winners("eval/elbo") == {1}
    elsewhere = some_runs.write(tmp_path / "other", {"eval/elbo": [0.0, 0.0, 0.0]}, data="e" * 64)
    assert compared([*seeds, elsewhere]).winners("eval/elbo") == set()
    shorter = some_runs.write(tmp_path / "short", {"eval/elbo": [0.0]}, objective__beta=1.0)
    comparison = compared([*seeds, shorter])
    assert comparison.winners("eval/elbo") == set()
    assert list(comparison.notes(["eval/elbo"]))[-1] == "not of the same step (1 at 30, 2 at 30, 3 at 10): eval/elbo"


def test_a_run_that_lags_behind_is_not_averaged_with_those_at_the_end(seeds, tmp_path, capsys):
    late = some_runs.write(tmp_path / "late", {"eval/elbo": [-1000.0]}, seed=3)
    assert main([*map(str, seeds), str(late)]) == 0
    printed = capsys.readouterr().out
    assert "-24.0 ± 3.0 (3 of 4)" in printed
    assert "10-30 of 30" in printed
    assert f"- incomplete: {late} is at step 10 of 30" in printed


def test_a_run_that_is_being_written_is_read_up_to_its_last_whole_row(tmp_path):
    run = some_runs.write(tmp_path / "a", {"eval/elbo": [-3.0, -2.0]})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "seen"')
    assert read(run).curves == {"eval/elbo": [Point(10, 80, -3.0), Point(20, 160, -2.0)]}


def test_a_later_evaluation_counts_and_replaces_what_it_repeats(tmp_path):
    run = some_runs.write(tmp_path / "a", {"eval/elbo": [-3.0, -2.0]})
    row = {"step": 20, "seen": 160, "eval/elbo": -2.5, "eval/fid": 9.0}
    some_runs.draw(run, "metrics.json", 20, json.dumps(row).encode(), "evaluation")
    some_runs.draw(run, "swaps.png", 20, b"later", "evaluation")
    found = read(run)
    assert found.curves["eval/elbo"][-1].value == -2.5
    assert found.curves["eval/fid"] == [Point(20, 160, 9.0)]
    assert found.pictures["swaps"][20].read() == b"later"


def test_what_is_damaged_or_no_run_is_named_in_a_line_and_the_others_are_compared(seeds, tmp_path, capsys):
    damaged = some_runs.write(tmp_path / "damaged", {})
    (damaged / "metrics.jsonl").write_text('{"step": 10, "seen": 80}\n{"step": oops}\n{"step": 20, "seen": 160}\n')
    (tmp_path / "empty").mkdir()
    assert main([str(seeds[0]), str(damaged), str(tmp_path / "empty"), str(tmp_path / "nowhere")]) == 1
    printed = capsys.readouterr()
    assert "-21" in printed.out
    assert printed.err.splitlines() == [
        f"vaedist: {damaged}/metrics.jsonl:2: is not a row with a step and images seen: move the file away",
        f"vaedist: {tmp_path}/empty: is no run: there is no recipe.yaml in it",
        f"vaedist: {tmp_path}/nowhere: is no run: there is no recipe.yaml in it",
    ]


def test_what_a_person_left_in_a_run_ends_no_comparison(tmp_path):
    run = some_runs.write(tmp_path / "a", {"eval/elbo": [-3.0]})
    (run / "pictures" / "step-00000010.old").mkdir(parents=True)
    (run / "pictures" / "step-00000010.old" / "swaps.png").touch()
    (run / "wandb").mkdir()
    (run / "wandb" / "id").write_text("abc")
    recipe = run / "recipe.yaml"
    recipe.write_text("\n".join(line for line in recipe.read_text().splitlines() if "project" not in line))
    found = read(run)
    assert (found.pictures, found.path) == ({}, "")


def test_a_quoted_glob_means_the_runs_it_matches_each_once(seeds, tmp_path, capsys):
    (tmp_path / "slurm.log").touch()
    assert main([f"{tmp_path}/*", str(seeds[0])]) == 0
    assert capsys.readouterr().out.count("seed=0") == 1
    assert main([f"{tmp_path}/none*"]) == 1
    assert f"{tmp_path}/none*: matches no run" in capsys.readouterr().err


def test_metrics_are_chosen_by_name_or_pattern(tmp_path, capsys):
    run = str(some_runs.write(tmp_path / "a", {"latent/tc": [1.0], "latent/kl_00": [2.0], "train/recon": [3.0]}))
    main([run])
    assert "kl_00" not in capsys.readouterr().out
    main([run, "--metrics", "latent/kl_*,train/recon"])
    assert "kl_00" in capsys.readouterr().out
    assert main([run, "--metrics", "latent/tcc"]) == 1
    assert "no run has latent/tcc; did you mean latent/tc" in capsys.readouterr().err


def test_the_table_fits_the_terminal(seeds, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    main([*map(str, seeds)])
    table, _, _ = capsys.readouterr().out.partition("seed 0")
    assert max(map(len, table.splitlines())) <= 30


def test_json_and_csv_have_every_run_and_every_configuration(seeds, tmp_path):
    main([*map(str, seeds), "--json", str(tmp_path / "x.json"), "--csv", str(tmp_path / "x.csv")])
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["differs"] == ["objective.beta"]
    assert found["configurations"][0]["final"]["eval/elbo"] == {"mean": -24.0, "std": 3.0, "n": 3, "steps": [30]}
    assert found["runs"][1]["curves"]["eval/elbo"] == {"step": [10, 20, 30], "seen": [80, 160, 240], "value": ELBOS[1]}
    assert found["runs"][1]["recipe"]["optimizer.lr"] == "0.0005"
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    names = ("run", "objective.beta", "n", "eval/elbo", "eval/elbo std")
    assert [[row[name] for name in names] for row in rows[:3]] == [
        ["", "4", "3", "-24.0", "3.0"], ["", "8", "1", "-38.5", ""], [str(seeds[0]), "4", "1", "-21.0", ""]
    ]  # fmt: skip


def test_to_compare_nobody_waits_for_torch_or_wandb(seeds):
    script = (
        "import sys; from vaedist.compare.__main__ import main; main(sys.argv[1:]);"
        "print({'torch', 'wandb', 'plotly'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", script, *map(str, seeds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")
