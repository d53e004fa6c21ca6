"""What a run measures is on the disk when it is said to be, and W&B can fail in any way without harm."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb_server
from PIL import Image
from wandb_records import logged

from vaedist import wandb_view
from vaedist.config import ConfigError
from vaedist.pictures import write_pictures
from vaedist.stop import StoppedError
from vaedist.tracker import Config, Tracker, foreseen, open_tracker, open_view

OFF = Config(wandb="off")
PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    wandb_server.forget_credentials(monkeypatch, tmp_path)
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.fixture
def lines() -> list[str]:
    """What was announced to the user."""
    return []


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "a run"


def start(track: Config, run: Path, lines: list[str], *, done: int = 0, **config: Any) -> Tracker:
    recipe = {"run": str(run), "objective": {"name": "vae"}, "data": {"shards": "data/faces"}} | config
    return open_tracker(track, run=run, recipe=recipe, environment={"data": "d1"}, done=done, announce=lines.append)


def row(step: int) -> dict[str, float]:
    return {"step": step, "seen": 64 * step, "train/loss": 1 / step}


def rows(run: Path) -> list[dict[str, float]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]


# metrics.jsonl and pictures


def test_a_row_is_on_the_disk_when_log_returns(run: Path, lines: list[str]) -> None:
    with start(OFF, run, lines) as tracker:
        for step in range(1, 4):
            tracker.log(row(step))
            assert rows(run) == [row(n) for n in range(1, step + 1)]
    assert lines == []


def test_a_second_process_on_the_same_run_is_refused(run: Path, lines: list[str]) -> None:
    with start(OFF, run, lines), pytest.raises(ConfigError, match=f"process {os.getpid()} on .* is training this run"):
        start(OFF, run, lines)
    start(OFF, run, lines).close()


def test_numbers_keep_every_bit(run: Path, lines: list[str]) -> None:
    with start(OFF, run, lines) as tracker:
        tracker.log({"step": 1, "tiny": 5e-324, "numpy": np.float64(0.1)})
    assert rows(run) == [{"step": 1, "tiny": 5e-324, "numpy": 0.1}]


@pytest.mark.parametrize("half", ["", '{"step": 8', '{"step": 8, "seen": 1}'])
def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(run: Path, lines: list[str], half: str) -> None:
    with start(OFF, run, lines) as tracker:
        for step in range(1, 8):
            tracker.log(row(step))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(half)
    with start(OFF, run, lines, done=5) as tracker:
        assert rows(run) == [row(step) for step in range(1, 6)]
        for step in range(6, 11):
            tracker.log(row(step))
    assert rows(run) == [row(step) for step in range(1, 11)]


def test_a_run_that_died_before_its_first_checkpoint_starts_an_empty_file(run: Path, lines: list[str]) -> None:
    with start(OFF, run, lines) as tracker:
        tracker.log(row(1))
    with start(OFF, run, lines):
        pass
    assert rows(run) == []


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"seen": 1}', '{"step": null}'])
def test_a_metrics_file_that_is_not_one_is_refused(run: Path, lines: list[str], line: str) -> None:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(f"{json.dumps(row(1))}\n{line}\n{json.dumps(row(3))}\n")
    with pytest.raises(ConfigError) as caught:
        start(OFF, run, lines, done=5)
    assert str(caught.value) == f"{run}/metrics.jsonl:2: is not a row with a step and images seen: move the file away"


def test_a_picture_is_the_pixels_it_was_given(run: Path, lines: list[str]) -> None:
    with start(OFF, run, lines) as tracker:
        tracker.pictures({"samples": PICTURE, "grid": PICTURE[:2]}, step=1000, seen=64000)
    directory = run / "pictures" / "step-00001000"
    assert sorted(path.name for path in directory.iterdir()) == ["grid.png", "samples.png"]
    with Image.open(directory / "samples.png") as image:
        np.testing.assert_array_equal(np.asarray(image), PICTURE)


# W&B


def test_an_address_that_is_none_leaves_the_run_offline(
    run: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.ai")  # the site, not its api
    with start(Config(), run, lines) as tracker:
        tracker.log(row(1))
    (line,) = lines
    assert line.startswith("W&B: off, ")
    assert "https://wandb.ai is not a valid server address" in line
    assert rows(run) == [row(1)]
    assert foreseen(Config()).startswith("offline, no credentials")


def test_without_credentials_the_run_is_offline_and_complete(run: Path, lines: list[str]) -> None:
    track = Config(project="p", group="sweep", tags=("x", "y"))
    with start(track, run, lines, objective={"name": "vae", "beta": 1.5}, seed=3) as tracker:
        for step in range(1, 4):
            if step == 3:
                tracker.pictures({"samples": PICTURE}, step=3, seen=192)
            tracker.log(row(step))
    assert lines == [
        f"W&B: offline, no credentials; `wandb login` stores them; upload: wandb sync '{run}/wandb'/offline-run-*"
    ]
    (segment,) = logged(run)
    assert (segment.id, segment.name, segment.group) == ((run / "wandb" / "id").read_text(), "a run", "sweep")
    assert segment.tags == ["x", "y", "vae", "faces"]
    assert segment.exit_code == 0
    keys = ("objective.name", "objective.beta", "seed", "environment.data")
    assert [segment.config[key] for key in keys] == ["vae", 1.5, 3, "d1"]
    assert segment.step_metrics["*"] == "seen"
    assert [{key: found[key] for key in row(1)} for found in segment.rows[:3]] == [row(step) for step in range(1, 4)]
    assert len(segment.rows) == 3
    (path,) = (run / "wandb").glob("offline-run-*/files/media/images/pictures/samples_*.png")
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), PICTURE)


def test_a_resumed_run_is_the_same_run_on_wandb(run: Path, lines: list[str]) -> None:
    track = Config(wandb="offline")
    tracker = start(track, run, lines)
    tracker.log(row(1))
    tracker.close(failed=True)
    (first,) = logged(run)
    time.sleep(1)  # W&B names a segment by the second it starts in
    with start(track, run, lines, done=1) as tracker:
        tracker.log(row(2))
    (second,) = logged(run)  # it has what the first had, whatever became of that
    assert first.id == second.id
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert [found["seen"] for found in second.rows] == [64, 128]
    assert rows(run) == [row(1), row(2)]
    assert lines == [f"W&B: offline, as asked; upload: wandb sync '{run}/wandb'/offline-run-*"] * 2


def test_a_signal_while_wandb_is_imported_is_no_failure_of_it(
    run: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise StoppedError(signal.SIGTERM)

    def half_imported(*_: Any) -> None:
        raise AttributeError("partially initialized module 'wandb' has no attribute 'errors'")

    monkeypatch.setattr(wandb_view, "_start", stopped)
    monkeypatch.setattr(wandb_view, "_failures", half_imported)
    with pytest.raises(StoppedError):
        start(Config(), run, lines)
    with pytest.raises(StoppedError):
        wandb_view.Wandb(object(), None, -1, lines.append)._attempt(stopped)
    assert lines == []


@pytest.mark.parametrize(("track", "mode"), [(OFF, None), (OFF, "online"), (Config(), "disabled")])
def test_a_run_without_wandb_does_not_import_it(
    run: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch, track: Config, mode: str | None
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    with start(track, run, lines) as tracker:
        tracker.log(row(1))
        tracker.pictures({"samples": PICTURE}, step=1, seen=64)
    monkeypatch.undo()
    assert lines == []
    assert not (run / "wandb").exists()


def test_an_unknown_wandb_mode_in_the_environment_is_refused(
    run: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ConfigError) as caught:
        start(Config(), run, lines)
    assert str(caught.value) == (
        "environment: WANDB_MODE=ofline is no choice; did you mean offline (of online, run, offline, dryrun, disabled)?"
    )


@pytest.fixture
def refusing_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A W&B server that answers 401 to everything; the paths it was asked for."""
    asked: list[str] = []

    class Refuse(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refuse) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        yield asked
        server.shutdown()
        thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[wandb_server.Operations]:
    with wandb_server.serve() as state:
        monkeypatch.setenv("WANDB_BASE_URL", state.url)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        yield state


def steps(server: wandb_server.Operations, run: Path) -> list[tuple[int, int]]:
    """W&B's step and our clock of every row that the server has."""
    return [(found["_step"], found["seen"]) for found in server.run((run / "wandb" / "id").read_text()).rows]


def whole(last: int) -> list[tuple[int, int]]:
    return [(step, 64 * step) for step in range(1, last + 1)]


def sync(run: Path) -> None:
    command = [sys.executable, "-m", "wandb", "sync", *map(str, (run / "wandb").glob("offline-run-*"))]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def test_an_online_run_is_whole_on_the_server_and_resumes_without_gap_or_duplicate(
    run: Path, lines: list[str], server: wandb_server.Operations
) -> None:
    server.failures = [500]
    track = Config(notes="why", tags=("x",), artifacts=True)
    animation = np.stack([PICTURE, PICTURE[::-1]])
    tracker = start(track, run, lines, seed=3)
    for step in range(1, 6):
        if step == 2:
            tracker.pictures({"samples": PICTURE, "turn": animation}, step=2, seen=128)
        tracker.log(row(step) | {"latent/kl_00": 0.5, "latent/kl_01": 2.0, "eval/elbo": float(-abs(step - 3))})
    tracker.preempted()
    tracker.close()
    found = server.run((run / "wandb" / "id").read_text())
    assert lines == [f"W&B: online, {server.url}/me/vaedist/runs/{found.id}"]
    assert (found.state, found.about["notes"], found.about["jobType"]) == ("preempted", "why", "train")
    assert (found.about["group"], found.about["tags"]) == ("a run", ["x", "vae", "faces"])
    assert (found.values()["seed"], found.values()["environment.data"]) == (3, "d1")
    assert found.summary["eval/elbo"] == {"min": -2, "max": 0, "last": -2}
    assert found.rows[0]["latent/kl_histogram"]["values"].count(1) == 2
    assert {kind.rpartition(".")[2] for kind in found.files if "pictures/" in kind} == {"png", "gif"}

    (saved := run / "checkpoints" / "step-00000008").mkdir(parents=True)
    (saved / "state.json").write_text("{}")
    lost = rows(run)[:2]  # a process that was killed had sent steps 4 and 5, the checkpoint is of step 3
    with start(track, run, lines, done=3) as tracker:
        for step in range(4, 9):
            tracker.log(row(step) | {"eval/elbo": -9.0})
        tracker.complete(8)
    assert rows(run)[:2] == lost
    assert steps(server, run) == whole(8)
    assert found.summary["eval/elbo"] == {"min": -9, "max": 0, "last": -9}
    assert (found.state, found.used) == ("finished", ["faces"])
    assert server.manifest(f"checkpoint-{found.id}").keys() == {"state.json"}
    (data,) = [artifact for artifact in server.artifacts if artifact["artifactTypeName"] == "dataset"]
    assert json.loads(data["metadata"]) == {"location": str(Path("data/faces").absolute()), "digest": "d1"}


def test_what_a_killed_process_had_not_sent_is_sent_at_the_next_start(
    run: Path, lines: list[str], server: wandb_server.Operations
) -> None:
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row(step))}\n" for step in (1, 2, 3, 4)))
    with start(Config(), run, lines, done=3) as tracker:
        tracker.log(row(4))
    assert steps(server, run) == whole(4)


@pytest.mark.slow
def test_an_evaluation_is_a_run_of_its_own_beside_the_one_it_looks_at(
    run: Path, lines: list[str], server: wandb_server.Operations
) -> None:
    recipe = {"run": str(run), "objective": {"name": "vae"}, "data": {"shards": "data/faces"}}
    place = run / "evaluation" / "step-00000003"
    write_pictures(place, {"samples": PICTURE})
    (place / "metrics.json").write_text("{}")
    for _ in range(2):
        view = open_view(Config(), place, "eval", recipe, {"data": "d1"}, lines.append)
        assert view is not None
        view.replay([row(3)], lambda _: place)
        view.close(failed=False)
    assert all(line.startswith("W&B: online, ") for line in lines)
    assert len(server.runs) == 2
    for found in server.runs.values():
        assert (found.about["jobType"], found.about["group"]) == ("eval", "a run")
        assert found.about["displayName"] == "a run step-00000003"
        assert [(at["_step"], at["seen"]) for at in found.rows] == [(3, 192)]
        assert any("pictures/samples" in name for name in found.files)


@pytest.mark.slow
@pytest.mark.parametrize("failures", [[429, 503, 500, 429], [400] * 99])
def test_a_server_that_stumbles_costs_nothing_but_time(
    run: Path, lines: list[str], server: wandb_server.Operations, failures: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vaedist.wandb_view.LAST", 15.0)
    with start(Config(), run, lines) as tracker:
        server.failures += failures
        for step in range(1, 4):
            tracker.log(row(step))
    assert rows(run) == [row(step) for step in range(1, 4)]
    server.failures.clear()
    with start(Config(), run, lines, done=3) as tracker:
        tracker.log(row(4))
    assert steps(server, run) == whole(4)


@pytest.mark.slow
def test_a_server_that_never_answers_leaves_the_run_offline(
    run: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vaedist.wandb_view.PATIENCE", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        began = time.monotonic()
        with start(Config(), run, lines) as tracker:
            tracker.log(row(1))
        assert time.monotonic() - began < 40
    assert len(lines) == 1
    assert lines[0].startswith("W&B: offline, ")
    (segment,) = logged(run)
    assert [found["seen"] for found in segment.rows] == [64]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb_workspaces' own
def test_the_public_api_and_a_saved_workspace_find_the_runs(
    run: Path, lines: list[str], server: wandb_server.Operations
) -> None:
    with start(Config(), run, lines, seed=3) as tracker:
        for step in range(1, 4):
            tracker.log(row(step))
    import wandb
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    (found,) = wandb.Api().runs("me/vaedist", filters={"group": "a run", "config.seed.value": {"$gte": 3}})
    assert (found.state, found.config["seed"]) == ("finished", 3)
    history = found.history(keys=["train/loss"], x_axis="seen", pandas=False)
    assert history == [{"seen": 64 * step, "train/loss": 1 / step} for step in range(1, 4)]
    assert [at["seen"] for at in found.scan_history()] == [64, 128, 192]
    section = workspaces.Section("losses", panels=[reports.LinePlot(x="seen", y=["train/loss"])])
    workspaces.Workspace(entity="me", project="vaedist", name="runs", sections=[section]).save()
    (view,) = server.views
    assert "train/loss" in view["spec"]


@pytest.mark.slow
def test_offline_segments_are_one_run_without_gap_or_duplicate_after_a_sync(
    run: Path, lines: list[str], server: wandb_server.Operations
) -> None:
    track = Config(wandb="offline")
    for done, last in ((0, 5), (3, 7)):
        with start(track, run, lines, done=done) as tracker:
            for step in range(done + 1, last + 1):
                tracker.log(row(step))
        time.sleep(1)
    sync(run)
    assert steps(server, run) == whole(7)
    for done, last in ((5, 8), (8, 9)):  # after a sync, which had steps 6 and 7 too
        with start(track, run, lines, done=done) as tracker:
            for step in range(done + 1, last + 1):
                tracker.log(row(step))
        time.sleep(1)
    sync(run)
    assert steps(server, run) == whole(9)
    with start(Config(), run, lines, done=9) as tracker:
        tracker.log(row(10))
    assert steps(server, run) == whole(10)


def test_a_server_that_refuses_the_run_leaves_it_offline(
    run: Path, lines: list[str], refusing_server: list[str]
) -> None:
    with start(Config(), run, lines) as tracker:
        tracker.log(row(1))
    assert refusing_server
    assert len(lines) == 1
    assert lines[0].startswith("W&B: offline, ")
    assert "401" in lines[0]
    assert lines[0].endswith(f"; upload: wandb sync '{run}/wandb'/offline-run-*")
    (segment,) = logged(run)
    assert [found["seen"] for found in segment.rows] == [64]


def test_the_environment_may_ask_for_offline(
    run: Path, lines: list[str], refusing_server: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    start(Config(), run, lines).close()
    assert lines == [f"W&B: offline, as asked; upload: wandb sync '{run}/wandb'/offline-run-*"]
    assert refusing_server == []


def test_a_server_that_cannot_be_reached_leaves_the_run_offline(
    run: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("vaedist.wandb_view.PATIENCE", 2.0)
    with start(Config(), run, lines) as tracker:
        for step in range(1, 4):
            tracker.log(row(step))
    assert len(lines) == 1
    assert lines[0].startswith("W&B: offline, ")
    assert lines[0].endswith(f"; upload: wandb sync '{run}/wandb'/offline-run-*")
    assert rows(run) == [row(step) for step in range(1, 4)]


LOSES_WANDB = """
import os, signal, sys
from pathlib import Path
from vaedist.tracker import Config, open_tracker

def text(path):
    try:
        return path.read_text()
    except OSError:  # a process that has just ended
        return ""

def kill_wandb():
    children = [path for path in Path("/proc").glob("[0-9]*/status") if f"PPid:\\t{os.getpid()}\\n" in text(path)]
    (core,) = [int(path.parent.name) for path in children if "Name:\\twandb-core\\n" in text(path)]
    os.kill(core, signal.SIGKILL)

killed_at, run = int(sys.argv[1]), Path(sys.argv[2])
recipe = {"run": str(run), "objective": {"name": "vae"}, "data": {"shards": "data/faces"}}
where = {"data": "d1"}
with open_tracker(
    Config(wandb="offline"), run=run, recipe=recipe, environment=where, done=0, announce=print
) as tracker:
    for step in range(1, 5):
        if step == killed_at:
            kill_wandb()
        tracker.log({"step": step, "seen": 64 * step, "train/loss": 1 / step})
    if killed_at == 5:
        kill_wandb()
"""


@pytest.mark.parametrize("killed_at", [2, 5])
def test_the_death_of_wandb_costs_one_line_and_nothing_else(run: Path, killed_at: int) -> None:
    command = [sys.executable, "-c", LOSES_WANDB, str(killed_at), str(run)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    offline, lost = result.stdout.splitlines()
    assert offline.startswith("W&B: offline, as asked; ")
    assert lost.startswith("W&B: lost (")
    assert lost.endswith("); the run goes on, metrics.jsonl has everything")
    assert rows(run) == [row(step) for step in range(1, 5)]
