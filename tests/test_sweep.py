"""A sweep is said on the command line or in a file that W&B reads as well, and means the same runs."""

from pathlib import Path

import pytest

from launch.slurm import __main__ as slurm
from launch.slurm import jobs
from launch.slurm.jobs import status
from launch.slurm.sweep import combinations, written
from vaedist.recipe import load
from vaedist.words import ConfigError

SHIPPED = Path(__file__).resolve().parents[1] / "launch" / "sweep.yaml"


def test_the_shipped_sweep_is_nine_runs_that_parse():
    shared, lists = written([str(SHIPPED)])
    assert (shared, lists) == (["recipe=factorvae"], ["objective.gamma=5,10,20", "seed=0,1,2"])
    runs = [load([*shared, *words])[0] for words in combinations(lists)]
    assert [(run.objective.gamma, run.seed) for run in runs] == [(g, s) for g in (5.0, 10.0, 20.0) for s in (0, 1, 2)]


def test_words_after_a_file_are_shared_by_its_runs():
    assert written([str(SHIPPED), "train.steps=9"])[0] == ["recipe=factorvae", "train.steps=9"]


def test_words_are_a_sweep_as_they_are():
    assert written(["seed=0,1"]) == ([], ["seed=0,1"])
    assert written([]) == ([], [])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("method: bayes", "only `method: grid` can be submitted; for others use `wandb sweep` and an agent"),
        ("method: grid", "there are no parameters"),
        (
            "method: grid\nparameters:\n  seed: {min: 0, max: 3}",
            "parameters.seed={min: 0, max: 3} is neither `value: A` nor `values: [A, B]`, which a grid is made of",
        ),
    ],
)
def test_a_file_that_is_no_grid_is_answered_with_one_line(text, line, tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        written([str(path)])
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith(f": {line}")


def test_a_run_without_a_job_tells_how_far_it_is_and_one_that_is_not_there_is_an_error(tmp_path):
    assert status(tmp_path) == f"{tmp_path}: no job of its own; step 0, nothing saved yet"
    with pytest.raises(ConfigError, match="none: no job of SLURM has been submitted for it"):
        status(tmp_path / "none")


def test_a_run_that_cannot_be_stopped_keeps_no_other_from_it(tmp_path, monkeypatch, capsys):
    def stop(run: Path) -> str:
        if run == tmp_path / "ended":
            raise ConfigError("ended")
        return f"{run}: stopped"

    monkeypatch.setattr(jobs, "stop", stop)
    assert slurm.main(["stop", f"{tmp_path}/ended", f"{tmp_path}/other"]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err) == (f"{tmp_path}/other: stopped\n", "vaedist: ended\n")


def test_evaluations_have_a_gpu_and_are_submitted_when_all_jobs_are_written_down(tmp_path, monkeypatch, capsys):
    submitted: list[list[str]] = []

    def submit(options: list[str], script: Path, words: list[str]) -> str:
        if script.name == "evaluate.sbatch":
            assert all(status(tmp_path / name).startswith(f"{tmp_path}/{name}: job 7_") for name in "ab")
        submitted.append([*options, script.name])
        return "7"

    monkeypatch.setattr(jobs, "submit", submit)
    monkeypatch.setattr(jobs.Job, "fields", lambda job: {})
    monkeypatch.setattr("launch.slurm.check.check", lambda *_: None)
    monkeypatch.setenv("VAEDIST", ".")
    words = ["recipe=vae", "--sweep", f"run={tmp_path}/a,{tmp_path}/b", "--gpus", "4", "--evaluate"]
    assert slurm.main(words) == 0, capsys.readouterr().err
    assert ["--gpus-per-node=4" in options for options in submitted] == [True, False, False]
    assert [options[-1] for options in submitted] == ["train.sbatch", "evaluate.sbatch", "evaluate.sbatch"]
    assert all("--gpus-per-node=1" in options for options in submitted[1:])
