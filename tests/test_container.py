"""The image of the Dockerfile, really built, and run without a network by a user whom it does not know."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import cases
import containers
import psutil
import pytest
from attempts import wait

from vaedist import environment

ROOT = Path(__file__).resolve().parents[1]
TAG = "localhost/vaedist:test"
COMMIT = "0123456789abcdef"
USER = 12345
LOOK = """
import json, os
from importlib.metadata import distributions
packages = {dist.metadata["Name"]: dist.version for dist in distributions()}
print(json.dumps({"user": os.getuid(), "files": os.listdir(), "packages": packages}))
"""


@pytest.fixture(scope="session")
def image() -> str:
    containers.require()
    containers.build(ROOT, TAG, COMMIT=COMMIT)
    return TAG


@pytest.fixture
def home(tmp_path) -> Path:
    """A folder of the user with a small data set."""
    cases.pack_discs(tmp_path / "data" / "discs")
    (tmp_path / "runs").mkdir()
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.chown(path, USER, USER)
    return tmp_path


@pytest.fixture
def training(image, home) -> Iterator[str]:
    """A container that trains for long, as the README starts it."""
    name = f"vaedist-{os.getpid()}"
    folders = [f"--volume={home / folder}:/opt/vaedist/{folder}" for folder in ("data", "runs")]
    endless = dict.fromkeys(("train_steps", "checkpoint_every", "evaluate_every"), 1_000_000)
    words = cases.words("vae", Path("data/discs"), Path("runs/long"), **endless)
    started = containers.run(
        "--detach", f"--name={name}", f"--user={USER}", *folders, image, "vaedist/train.py", *words
    )
    assert started.returncode == 0, started.stderr
    yield name
    containers.ask("podman", "rm", "--force", "--time=0", name)


def test_an_image_knows_the_commit_that_it_was_built_from(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_git", lambda *words: None)
    monkeypatch.setattr(environment, "BUILT_FROM", tmp_path / "COMMIT")
    for said, commit in ((None, None), (f"{COMMIT}\n", COMMIT)):
        if said:
            environment.BUILT_FROM.write_text(said)
        found = environment.environment(step=0, world_size=1, device="CPU", data="")
        assert (found["commit"], found["modified"]) == (commit, None)


@pytest.mark.slow
def test_the_image_holds_what_runs_need_of_the_lock_and_no_more(image, capsys):
    (told,) = json.loads(containers.ask("podman", "inspect", "--type=image", image))
    with capsys.disabled():
        print(f"\n{image}: {told['Size'] / 1e9:.2f} GB")
    assert told["Config"]["Entrypoint"][-2:] == ["accelerate", "launch"]
    assert told["Config"]["Labels"]["org.opencontainers.image.revision"] == COMMIT
    done = containers.run("--rm", "--entrypoint=python", image, "-c", LOOK)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["user"] == 1000
    ours = {"launch", "recipes", "shards", "vaedist", "pyproject.toml", "requirements.lock"}
    assert set(found["files"]) == {*ours, "COMMIT", "data", "runs"}
    locked = set(re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    packages = {(re.sub(r"[-_.]+", "-", name).lower(), version) for name, version in found["packages"].items()}
    assert packages <= locked
    assert {"torch", "deepspeed", "s3fs"} <= {name for name, _ in packages}
    assert not {"pytest", "moto", "mypy"} & {name for name, _ in packages}


@pytest.mark.slow
def test_a_user_whom_the_image_does_not_know_trains_in_a_folder_of_their_own(image, home):
    """As Apptainer does it: the image is read-only, and the home and the working directory are the user's."""
    place = ("--read-only", f"--volume={home}:{home}", f"--workdir={home}", f"--env=HOME={home}", f"--user={USER}")
    words = ("run=runs/short", "data.draw=100", "train.steps=20", "track.every=10")
    done = containers.run("--rm", *place, image, "-m", "vaedist.train", "recipe=quickstart", *words, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    run = home / "runs" / "short"
    assert "runs/short: complete at step 20; pictures in runs/short/pictures/step-00000020" in done.stdout
    assert [row["step"] for row in cases.rows(run)] == [10, 20]
    assert json.loads((run / "environment.json").read_text())[0]["commit"] == COMMIT
    assert {path.stat().st_uid for path in home.rglob("*")} == {USER}


@pytest.mark.slow
def test_a_container_is_healthy_while_its_run_moves_and_saves_when_it_is_stopped(training, home):
    def healthy() -> bool:
        return containers.call("podman", "healthcheck", "run", training).returncode == 0

    metrics, stopped = home / "runs" / "long" / "metrics.jsonl", home / "runs" / "long" / "REQUEUE"
    assert healthy()  # it is starting
    wait(lambda: metrics.exists() and metrics.stat().st_size, "a row")
    assert healthy()
    first = psutil.Process(int(containers.ask("podman", "inspect", "--format={{.State.Pid}}", training)))
    processes = first.children(recursive=True)
    for process in processes:
        process.suspend()
    os.utime(metrics, (0, metrics.stat().st_mtime - 3600))
    assert not healthy()
    for process in processes:
        process.resume()
    wait(healthy, "another row")
    containers.ask("podman", "stop", "--time=120", training)
    assert stopped.exists()
    (saved,) = (home / "runs" / "long" / "checkpoints").iterdir()
    assert saved.name == f"step-{cases.rows(metrics.parent)[-1]['step']:08d}"
