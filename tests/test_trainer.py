"""Whole runs as a user starts them: what they leave behind, what they say, and what they refuse."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import cases
import numpy as np
import pytest
import yaml
from http_server import serving
from launching import TRAIN, complaints, launch
from PIL import Image
from small import small
from tiny_set import pack_tiny, spoil
from wandb_records import logged

from shards.manifest import read
from vaedist import trainer
from vaedist.checkpoint import CheckpointError, Checkpoints
from vaedist.config import available, dump
from vaedist.evaluate import evaluate, recipe_of
from vaedist.recipe import load
from vaedist.train import main


def short(data: Path, run: Path, *more: str) -> list[str]:
    """A run of four steps; `more` goes before the rest."""
    words = cases.words("factorvae", data, run, train_steps=4, checkpoint_every=2, evaluate_every=3)
    told = {word.partition("=")[0] for word in more}
    return [word for word in words if word.partition("=")[0] not in told] + list(more)


def changed(directory: Path, line: str) -> Path:
    """train.py with a line before it."""
    script = directory / "changed.py"
    script.write_text(f"import os, runpy, sys\n{line}\nrunpy.run_path({str(TRAIN)!r}, run_name='__main__')\n")
    return script


def pixels(path: Path) -> np.ndarray:
    """Of a picture, or of the first frame of an animation."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_a_run_leaves_its_recipe_surroundings_metrics_pictures_and_checkpoints(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert (
        main(short(data, run, "track.wandb=offline", "evaluate.names=[elbo, reconstructions, samples, traversals]"))
        == 0
    )
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{run}: 1 process on CPU, fp32, batch 16, 16 images at a time on each"
    assert said[-1] == f"{run}: complete at step 4; pictures in {run}/pictures/step-00000004"
    assert load([f"recipe={run}/recipe.yaml"])[0].run == run
    (where,) = json.loads((run / "environment.json").read_text())
    assert (where["step"], where["world_size"]) == (0, 1)
    assert where["packages"]["torch"] == version("torch")
    rows = cases.rows(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["epoch"] == row["seen"] / 50 and row["perf/images_per_s"] > 0 for row in rows)
    assert [sorted(key for key in row if key.startswith("eval/")) for row in rows] == [
        [], [], *[["eval/elbo", "eval/kl", "eval/recon"]] * 2
    ]  # fmt: skip
    assert rows[-1]["eval/elbo"] == -(rows[-1]["eval/recon"] + rows[-1]["eval/kl"])
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    assert len(list((run / "wandb").glob("offline-run-*/*.wandb"))) == 1
    for step in (3, 4):
        paths = (run / "pictures" / f"step-{step:08d}").iterdir()
        pictures = {path.stem: pixels(path) for path in paths}
        assert {name: (picture.shape[0] // 66, picture.shape[1] // 66) for name, picture in pictures.items()} == {
            "reconstructions": (2, 11),  # ten of the thirteen held-out images over their twins; a column of labels
            "samples": (8, 10),
            "samples_aggregate": (8, 10),
            "traversals": (10, 12),
            "traversals_animation": (3, 10),
        }
        assert all(picture.std() > 1 for picture in pictures.values())
    assert pixels(run / "curves.png").std() > 1


def test_originals_stand_above_their_reconstructions(data, tmp_path):
    run = tmp_path / "run"
    assert main(short(data, run, "evaluate.names=[reconstructions]")) == 0
    picture = pixels(run / "pictures" / "step-00000004" / "reconstructions.png")
    config = load(short(data, run))[0].data
    originals = config.open(config.find(print), print).valid.gather(np.arange(10)).permute(0, 2, 3, 1).numpy()
    lower, right = picture.shape[0] - 66, picture.shape[1] - 660
    tiles = [picture[lower - 66 : lower - 2, right + 66 * i : right + 66 * i + 64] for i in range(10)]
    assert all(np.array_equal(tile, original) for tile, original in zip(tiles, originals, strict=True))


def test_held_out_elbo_counts_every_image_once_whatever_the_batch(data, tmp_path):
    found = []
    for batch in (1, 5, 256):
        run = tmp_path / str(batch)
        assert main(short(data, run, f"evaluate.batch={batch}", "train.precision=fp64", "train.steps=1")) == 0
        found.append(cases.rows(run)[-1]["eval/elbo"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-12)


def test_the_same_command_again_says_that_the_run_is_complete(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(short(data, run, "evaluate.names=[samples]")) == 0
    before = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(short(data, run)) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == f"{run}: complete at step 4; pictures in {run}/pictures/step-00000004"
    )
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_a_run_that_was_killed_after_its_last_step_had_not_done_the_same_command_does(data, tmp_path, capsys):
    run, words = tmp_path / "run", ("track.wandb=offline", "evaluate.names=[samples]")
    assert main(short(data, run, *words)) == 0
    assert (run / "COMPLETE").read_text() == "4"
    before = cases.rows(run)
    for lost in ("COMPLETE", "curves.png"):
        (run / lost).unlink()
    shutil.rmtree(next((run / "wandb").glob("offline-run-*")))
    (run / "REQUEUE").touch()
    for again in (True, False):
        capsys.readouterr()
        assert main(short(data, run, *words)) == 0
        assert ("W&B: offline" in capsys.readouterr().out) == again
        assert {"COMPLETE", "curves.png"} <= {path.name for path in run.iterdir()}
        assert not (run / "REQUEUE").exists()
    assert cases.rows(run) == before
    assert [start["step"] for start in json.loads((run / "environment.json").read_text())] == [0]  # nobody has trained
    (sent,) = logged(run)
    assert [row["step"] for row in sent.rows] == [row["step"] for row in before]


def test_more_steps_go_on_from_the_last_checkpoint(data, tmp_path, capsys, monkeypatch):
    mark, loop, marked = tmp_path / "a" / "COMPLETE", trainer.loop, []
    monkeypatch.setattr(trainer, "loop", lambda *given: marked.append(mark.exists()) or loop(*given))
    assert main(short(data, tmp_path / "a")) == 0
    assert mark.read_text() == "4"
    assert main(short(data, tmp_path / "a", "train.steps=6")) == 0
    assert mark.read_text() == "6"
    assert marked == [False, False]
    assert f"{tmp_path / 'a'}: resumed at step 4" in capsys.readouterr().out.splitlines()
    assert [start["step"] for start in json.loads((tmp_path / "a" / "environment.json").read_text())] == [0, 4]
    assert main(short(data, tmp_path / "b", "train.steps=6")) == 0
    assert cases.terms(tmp_path / "a") == cases.terms(tmp_path / "b")


def test_a_log_line_that_spans_a_restart_is_the_one_of_an_uninterrupted_run(data, tmp_path):
    for run, stops in (("whole", (6,)), ("stopped", (2, 6))):
        for steps in stops:
            every = "track.every=4" if steps == 6 else "track.every=100"
            assert main(short(data, tmp_path / run, f"train.steps={steps}", every, "evaluate.every=100")) == 0
    whole, stopped = (
        {row["step"]: {k: v for k, v in row.items() if k.startswith("train/")} for row in cases.rows(tmp_path / run)}
        for run in ("whole", "stopped")
    )
    assert stopped.keys() == {2, 4, 6}  # a last step has a row, and the next row is nevertheless of all its steps
    assert whole == {step: stopped[step] for step in (4, 6)}


@pytest.mark.parametrize("full", [True, False])
def test_a_checkpoint_that_a_file_asks_for_is_said_to_be_there_where_it_is(full, data, tmp_path, capsys, monkeypatch):
    run, write, asked = tmp_path / "run", Checkpoints.write, tmp_path / "run" / "SAVE"
    run.mkdir()
    asked.touch()
    found = []

    def refused(checkpoints, state):
        found.append(asked.exists())
        if full and state.progress.step < 4:
            raise CheckpointError("full")
        return write(checkpoints, state)

    monkeypatch.setattr(Checkpoints, "write", refused)
    assert main(short(data, run, "checkpoint.required=false", "checkpoint.every=100")) == 0
    assert (f"{run}: saved at step 1, as the file SAVE asked" in capsys.readouterr().out) != full
    assert found == [True, full]
    assert not asked.exists()  # the last checkpoint is one, too


def test_a_changed_recipe_is_not_resumed(data, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(short(data, run)) == 0
    assert main(short(data, run, "objective.gamma=10", "train.steps=8")) == 1
    assert complaints(capsys.readouterr().err) == [
        f"vaedist: {run}/checkpoints/step-00000004: this run was started with objective.gamma=6.4, now it is 10.0: "
        "say run=ANOTHER_DIRECTORY to start a new one"
    ]


def test_a_checkpoint_refuses_another_data_set_unless_the_user_names_the_one_it_is_of(data, tmp_path, capsys):
    run, other = tmp_path / "run", tmp_path / "other"
    cases.pack_discs(other, train=40)
    assert main(short(data, run)) == 0
    old, new = (read(directory).digest[:12] for directory in (data, other))
    assert main(short(other, run, "train.steps=8")) == 1
    assert complaints(capsys.readouterr().err) == [
        f"vaedist: {run}/checkpoints/step-00000004: this run was started on the data set {old}, {other} is {new}: "
        f"say run=ANOTHER_DIRECTORY to start a new one, or data.instead_of={old} to go on with this set knowingly"
    ]
    assert main(short(other, run, "train.steps=8", f"data.instead_of={new}")) == 1
    assert main(short(other, run, "train.steps=8", f"data.instead_of={old}")) == 0
    assert [row["step"] for row in cases.rows(run)] == list(range(1, 9))
    assert main(short(other, run, "train.steps=9")) == 0  # the newest checkpoint is of this set


def test_dry_run_prints_the_resolved_recipe_and_touches_nothing(data, tmp_path, capsys):
    words = short(data, tmp_path / "run")
    assert main([*words, "dry_run=true"]) == 0
    printed = capsys.readouterr().out
    assert printed == dump(load(words)[0])
    assert yaml.safe_load(printed)["objective"]["name"] == "factorvae"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["recipe=factorvea"], "command line: there is no recipe factorvea; did you mean factorvae"),
        (["recipe=vae", "train.stepps=3"], "command line: train.stepps=3 is not a key"),
        (["recipe=vae", "train.steps=many"], "command line: train.steps=many is not an int"),
        (["recipe=vae", "objective=factorva"], "did you mean factorvae (of annealedvae, betatcvae, "),
        (["recipe=vae", "evaluate.names=[elbow]"], "evaluate: names: no evaluator 'elbow', there are attributes,"),
        (["recipe=vae", "data.shards=nowhere"], "nowhere: there is no such data set; make it with"),
        (["recipe=vae", "train.batch=10", "train.accumulate=4"], "train.batch=10 does not divide"),
        (["recipe=vae", f"seed={10**23}"], "is out of range"),
        (["recipe=vae", "train.batch=1e12"], "is out of range"),
        (["recipe=vae", "train.steps=1e15"], "is out of range"),
        (["recipe=vae", "train.timeout=4e9"], "is out of range: it must be above 0 and at most 100000000"),
        (["recipe=vae", "track.every=1e6"], "is out of range: it must be at least 1 and at most 100000"),
        (["recipe=vae", "data.cache_gb=1e300"], "is out of range"),
    ],
)
def test_a_wrong_word_is_answered_with_one_line(words, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1
    assert line in printed.err


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("", "no directory", "{run}: is a file; say run=ANOTHER"),
        ("environment.json", "", "{run}/environment.json: is not a list of the run's starts; move it away"),
        ("environment.json", "{}", "{run}/environment.json: is not a list of the run's starts; move it away"),
    ],
)
def test_what_lies_in_a_runs_place_is_named(file, content, line, data, tmp_path, capsys):
    run = tmp_path / "run"
    if file:
        run.mkdir()
    (run / file).write_text(content)
    assert main(short(data, run)) == 1
    (found,) = complaints(capsys.readouterr().err)
    assert found.startswith(f"vaedist: {line.format(run=run)}")


def test_a_run_that_another_process_has_trained_since_it_was_read_keeps_its_rows(data, tmp_path, capsys, monkeypatch):
    run, read = tmp_path / "run", trainer.open_run

    def read_and_wait(*given):
        found = read(*given)
        monkeypatch.undo()
        assert main(short(data, run)) == 0
        return found

    monkeypatch.setattr(trainer, "open_run", read_and_wait)
    assert main(short(data, run)) == 1
    (line,) = complaints(capsys.readouterr().err)
    assert line.startswith(f"vaedist: {run}/checkpoints: another process has trained this run meanwhile, to step 4;")
    assert [row["step"] for row in cases.rows(run)] == [1, 2, 3, 4]


def test_what_is_wrong_on_another_machine_is_said_there(capsys, monkeypatch):
    """By its first process: rank 0 is elsewhere, and may find nothing wrong."""
    monkeypatch.setattr("vaedist.train.PATIENCE", 0.0)
    monkeypatch.setenv("RANK", "9")
    for local, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", local)
        assert main(["recipe=missing"]) == 1
        assert len(complaints(capsys.readouterr().err)) == lines


def test_a_model_that_does_not_fit_the_images_is_refused_before_any_is_decoded(data, tmp_path, capsys):
    assert main(short(data, tmp_path / "run", "data.size=32", f"data.cache={tmp_path}/cache")) == 1
    assert not (tmp_path / "cache").exists()
    assert complaints(capsys.readouterr().err) == [
        "vaedist: model.name=conv64 reads 64x64 images, but data.size=32: set data.size=64"
    ]


@pytest.mark.parametrize("name", [name for name in available("vaedist.objectives") if small(name).couples_rows])
def test_an_objective_that_compares_images_refuses_a_batch_of_one(name, data, tmp_path, capsys):
    assert main(cases.words(name, data, tmp_path / "run", train_batch=1)) == 1
    assert complaints(capsys.readouterr().err) == [
        "vaedist: train.batch=1: this objective compares the images of a batch, it needs two at least"
    ]


def test_stratified_sampling_refuses_a_batch_larger_than_the_set(data, tmp_path, capsys):
    words = {"train_steps": 1, "evaluate_names": "[]", "data_flip": "false"}
    assert main(cases.words("betatcvae-mss", data, tmp_path / "all", train_batch=50, **words)) == 0
    capsys.readouterr()
    assert main(cases.words("betatcvae-mss", data, tmp_path / "more", train_batch=51, **words)) == 1
    assert complaints(capsys.readouterr().err) == [
        "vaedist: minibatch-stratified sampling needs 2 to 50 images a batch, train.batch=51: change that, or say "
        "objective.sampling=mws"
    ]


def test_batch_normalisation_under_accumulation_is_announced(data, tmp_path, capsys):
    line = "batch normalisation takes the statistics of a micro-batch: train.accumulate changes this run"
    for case, accumulate in (("conv128", 2), ("conv128", 1), ("factorvae", 2)):
        more = {"train_steps": 1, "train_batch": 4, "train_accumulate": accumulate, "evaluate_names": "[]"}
        assert main(cases.words(case, data, tmp_path / f"{case}{accumulate}", **more)) == 0
        assert capsys.readouterr().out.splitlines().count(line) == (case == "conv128" and accumulate == 2)


def test_a_run_that_diverges_stops_names_the_step_and_saves_nothing_of_it(data, tmp_path, capsys):
    run = tmp_path / "run"
    words = ("optimizer.lr=1e30", "track.every=100", "evaluate.every=3", "checkpoint.every=100")
    assert main(short(data, run, *words)) == 1
    (line,) = complaints(capsys.readouterr().err)
    assert line.startswith("vaedist: step 2: loss=")
    assert cases.rows(run) == []
    assert not (run / "checkpoints").exists()


def test_two_processes_say_so_and_leave_one_set_of_files(data, tmp_path):
    run = tmp_path / "run"
    done = launch(*short(data, run, "evaluate.names=[elbo, samples]"), processes=2)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert done.stdout.count(f"{run}: 2 processes on CPU, fp32, batch 16, 8 images at a time on each") == 1
    assert said[-1] == f"{run}: complete at step 4; pictures in {run}/pictures/step-00000004"
    assert len(cases.rows(run)) == 4
    assert json.loads((run / "environment.json").read_text())[0]["world_size"] == 2
    assert (run / "pictures" / "step-00000004" / "samples.png").exists()
    assert "Warning" not in done.stderr


def test_the_readmes_first_command_draws_packs_trains_and_names_the_pictures(tmp_path):
    """In small, and on two processes, of which one draws."""
    places = (f"data.shards={tmp_path}/faces", f"data.cache={tmp_path}/cache", f"run={tmp_path}/run")
    words = ("recipe=quickstart", "data.draw=40", "train.steps=3", *places)
    done = launch(*words, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        f"{tmp_path}/run: complete at step 3; pictures in {tmp_path}/run/pictures/step-00000003"
    )
    assert done.stdout.count("complete, train 32, valid 4, test 4; manifest") == 1
    pictures = sorted(path.name for path in (tmp_path / "run/pictures/step-00000003").iterdir())
    assert pictures == [
        "attributes.png", "attributes_animation.gif", "interpolation.png", "posterior.png", "reconstructions.png",
        "samples.png", "samples_aggregate.png", "traversals.png", "traversals_animation.gif",
    ]  # fmt: skip
    assert len(list((tmp_path / "run/wandb").glob("offline-run-*"))) == 1


def test_processes_that_the_launcher_did_not_start_are_missed(data, tmp_path):
    done = launch(*short(data, tmp_path / "run"), flags=("--cpu", "--num_processes", "2"))
    assert done.returncode != 0
    assert complaints(done.stderr) == [
        "vaedist: accelerate was asked for several processes but started one; without GPUs launch them by "
        "`accelerate launch --multi_gpu --num_processes N vaedist/train.py ...` (if one is what you want, unset "
        "MASTER_ADDR and MASTER_PORT)"
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [(["seed=one"], "vaedist: command line: seed=one is not an int"), (["data.shards=nowhere"], "vaedist: nowhere: ")],
)
def test_what_is_wrong_for_all_is_said_once_by_two_processes(words, line, data, tmp_path):
    done = launch(*short(data, tmp_path / "run", *words), processes=2)
    assert done.returncode != 0
    (said,) = complaints(done.stderr)
    assert said.startswith(line)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_corrupt_image_ends_both_processes_and_is_named(tmp_path):
    data = tmp_path / "set"
    where = spoil(pack_tiny(data), 3)
    words = short(data, tmp_path / "run", "data.store=tar", "train.steps=40", "train.batch=2")
    done = launch(*words, processes=2)
    assert done.returncode != 0
    (said,) = complaints(done.stderr)
    assert where in said
    assert f"`python -m shards verify {data}`" in said


@pytest.mark.slow
def test_processes_that_would_take_different_steps_end_and_say_who_differs_in_what(data, tmp_path):
    script = changed(tmp_path, "sys.argv.append('seed=' + os.environ['RANK'])")
    done = launch(*short(data, tmp_path / "run"), processes=2, script=script)
    assert done.returncode != 0
    (said,) = complaints(done.stderr)
    host = platform.node()
    assert f"the processes disagree about the seed: rank 1 on {host} has 1, rank 0 on {host} 0; all need" in said


@pytest.mark.slow
def test_a_shard_that_stays_bad_ends_both_processes_with_its_url(tmp_path):
    found = pack_tiny(tmp_path / "set", train=40)
    shard = found.split("train").shards[2]
    with serving() as server:
        server.files = {f"/set/{path.name}": path.read_bytes() for path in found.directory.iterdir()}
        server.files[f"/set/{shard.name}"] = server.files[f"/set/{shard.name}"][:-512]
        words = ("data.store=tar", "data.window=2", "train.steps=40", "train.batch=2", f"data.shards={server.url}/set")
        script = changed(tmp_path, "from shards.remote import fetch; fetch.BACKOFF = 0.01")
        done = launch(*short(found.directory, tmp_path / "run", *words), processes=2, script=script)
    assert done.returncode != 0
    said = set(complaints(done.stderr))
    where, size = f"{server.url}/set/{shard.name}", shard.bytes
    assert any(f"{where}: {size - 512:,} of {size:,} bytes came; gave up after 6 tries" in line for line in said)


@pytest.mark.gpu
def test_a_gpu_takes_the_same_course_as_the_cpu(data, tmp_path):
    for device, environment in (("cuda", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        command = [sys.executable, str(TRAIN), *short(data, tmp_path / device, "train.precision=fp64")]
        subprocess.run(command, check=True, env=os.environ | environment)
    cuda, cpu = (cases.terms(tmp_path / device)["train/loss"] for device in ("cuda", "cpu"))
    assert cuda == pytest.approx(cpu, rel=1e-9)


def test_a_run_that_is_evaluated_again_has_the_same_numbers_and_pictures(data, tmp_path, capsys, monkeypatch):
    words = cases.words("conv64", data, tmp_path, train_steps=1, evaluate_names="[elbo, samples]", train_ema=0.5)
    assert main(words) == 0
    assert main([f"recipe={tmp_path}/recipe.yaml", f"run={tmp_path}"], evaluate) == 0
    found = tmp_path / "evaluation" / "step-00000001"
    evaluated, (row,) = json.loads((found / "metrics.json").read_text()), cases.rows(tmp_path)
    assert {"step", "seen", "eval/elbo", "eval/recon", "eval/kl"} == evaluated.keys()
    assert evaluated.items() <= row.items()
    assert (found / "samples.png").read_bytes() == (tmp_path / "pictures/step-00000001/samples.png").read_bytes()
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}: evaluated at step 1; see {found}"
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "se')  # while the run goes on
    assert main(recipe_of(str(tmp_path), ["evaluate.names=[quality]"]), evaluate) == 0
    later = json.loads((found / "metrics.json").read_text())
    assert evaluated.items() < later.items()
    assert "eval/psnr" in later
    with monkeypatch.context() as patched:  # REQUEUE would ask for more of the training
        patched.setattr("vaedist.evaluate.observed", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert main([f"recipe={tmp_path}/recipe.yaml", f"run={tmp_path}"], evaluate) == 75
    assert not (tmp_path / "REQUEUE").exists()
    capsys.readouterr()
    shutil.rmtree(tmp_path / "checkpoints")
    assert main([f"recipe={tmp_path}/recipe.yaml", f"run={tmp_path}"], evaluate) == 1
    (line,) = complaints(capsys.readouterr().err)
    assert line.endswith("there is no checkpoint to evaluate; train the run first")
