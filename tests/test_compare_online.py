"""Runs of W&B compare like those here; the saved view has exactly them."""

import io
import json
import sys

import numpy as np
import pytest
import some_runs
import wandb_server
from PIL import Image

from vaedist.compare.__main__ import main
from vaedist.compare.online import find, server
from vaedist.compare.runs import read
from vaedist.config import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")  # of wandb_workspaces


@pytest.fixture(autouse=True)
def _no_credentials(tmp_path, monkeypatch):
    wandb_server.forget_credentials(monkeypatch, tmp_path)


@pytest.fixture
def backend(monkeypatch):
    with wandb_server.serve() as state:
        monkeypatch.setenv("WANDB_BASE_URL", state.url)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        yield state


def upload(run, backend, job="train", extra=None):
    """What the tracker sends of a run directory, given to the server as it keeps it."""
    found = read(run)
    id = f"{run.name}-{job}"
    config = {key: {"value": _typed(value)} for key, value in found.recipe.items()}
    kept = wandb_server.Run(wandb_server.ENTITY, "p", id)
    kept.about = {"displayName": run.name if job == "train" else f"{run.name} {job}", "group": "g", "jobType": job}
    kept.config = config | {"environment.data": {"value": found.data}}
    rows = extra or [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        for name, steps in found.pictures.items():
            if row["step"] in steps and job == "train":
                path = f"media/images/pictures/{name}_{number}.png"
                kept.files[path] = steps[row["step"]].read()
                row[f"pictures/{name}"] = {"_type": "image-file", "path": path}
        kept.history.append(json.dumps(row | {"_step": number}))
    backend.runs[kept.key] = kept
    if job == "train":
        (run / "wandb").mkdir()
        (run / "wandb" / "id").write_text(id)


def _typed(text):
    try:
        return json.loads(text)
    except ValueError:
        return text


def picture():
    stream = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture
def runs(tmp_path, backend):
    found = []
    for name, changes in {"a": {}, "b": {"seed": 1}, "c": {"objective__beta": 8.0}}.items():
        run = some_runs.write(tmp_path / name, {"eval/elbo": [-3.0, -2.0, -1.0], "latent/tc": [1.0]}, **changes)
        some_runs.draw(run, "samples.png", 30, picture())
        upload(run, backend)
        found.append(run)
    return found


def test_a_run_reads_the_same_from_wandb_as_from_its_directory(runs, backend):
    evaluated = {"step": 30, "seen": 240, "eval/fid": 7.0}
    upload(runs[0], backend, "eval", [evaluated])
    some_runs.draw(runs[0], "metrics.json", 30, json.dumps(evaluated).encode(), "evaluation")
    with server() as api:
        online = find("me/p/g", api)
        assert [run.name for run in find("me/p/b", api)] == ["me/p/b"]
        assert [run.name for run in find("me/p/c-train", api)] == ["me/p/c"]
        with pytest.raises(ConfigError, match="me/p/z: is neither a directory nor a run or group"):
            find("me/p/z", api)
        for there, here in zip(online, map(read, runs), strict=True):
            assert (there.recipe, there.data, there.step) == (here.recipe, here.data, here.step)
            assert there.curves == here.curves
            assert there.pictures["samples"][30].read() == picture()


def test_runs_from_here_and_there_are_compared_and_saved_as_a_view_of_them_alone(runs, backend, tmp_path, capsys):
    assert main([str(runs[0]), "me/p/b", str(runs[2]), "--report", "--html", str(tmp_path / "x.html")]) == 0
    printed = capsys.readouterr().out
    assert "-1 ± 0" in printed
    assert f"W&B: {backend.url}/me/p?nw=" in printed
    (view,) = backend.views
    section = json.loads(view["spec"])["section"]
    (shown,) = section["runSets"]
    (chosen,) = shown["filters"]["filters"]
    assert (chosen["key"], chosen["op"]) == ({"section": "run", "name": "name"}, "IN")
    assert set(chosen["value"]) == {"a-train", "b-train", "c-train"}
    assert shown["grouping"] == [{"section": "config", "name": "objective.beta.value"}]
    panels = [panel for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]
    lines, axes, media = (
        [panel["config"] for panel in panels if kind in panel["viewType"]] for kind in ("Line", "Parallel", "Media")
    )
    assert [panel["metrics"] for panel in lines] == [["eval/elbo"], ["latent/tc"]]
    assert [axis["accessor"] for axis in axes[0]["columns"]] == [
        "config:objective.beta.value", "summary:eval/elbo.last", "summary:latent/tc"
    ]  # fmt: skip
    assert [panel["mediaKeys"] for panel in media] == [["pictures/samples"]]


def test_a_run_that_was_not_uploaded_is_named_with_what_to_do(runs, backend, capsys):
    del backend.runs["me/p/c-train"]
    assert main([*map(str, runs), "--report"]) == 1
    assert f"{runs[2]} is not on W&B; upload: wandb sync {runs[2]}/wandb/offline-run-*" in capsys.readouterr().err


def test_without_credentials_or_the_extra_a_line_says_so_and_the_rest_is_compared(runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert main([*map(str, runs), "--report"]) == 1
    assert "--report needs wandb-workspaces: pip install" in capsys.readouterr().err
    monkeypatch.delenv("WANDB_API_KEY")
    assert main([str(runs[0]), "me/p/b"]) == 1
    printed = capsys.readouterr()
    assert "seed 0" in printed.out
    assert printed.err == "vaedist: me/p/b: no such directory, and W&B: no credentials; `wandb login` stores them\n"
