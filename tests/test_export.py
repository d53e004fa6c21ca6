"""What is exported gives what was trained, alone and in other programs; a failure leaves nothing."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vaedist import pretrained
from vaedist.checkpoint import EMA, Checkpoints, Progress, State
from vaedist.config import ConfigError, as_dict
from vaedist.export import __main__ as export
from vaedist.export import programs
from vaedist.noise import Noise
from vaedist.objectives import Objective
from vaedist.recipe import load
from vaedist.world import World

CASES = {
    "vae": ["recipe=vae", "model.hidden=8", "model.latent=3"],
    "factorvae": ["recipe=factorvae", "model=burgess64", "model.latent=3", "objective.discriminator.width=8"],
    "qlae": ["recipe=qlae", "model.hidden=8", "model.latent=3", "objective.values=5"],
    "conv128": ["recipe=seed128", "model.hidden=16", "model.latent=3"],
}


def trained(case: str, run: Path, channels: int = 3) -> Objective:
    """A checkpoint after step 2 whose weights are drawn, what it says of itself, and the objective in evaluation."""
    recipe, _ = load([*CASES[case], "data.shards=data/discs", f"run={run}"])
    torch.manual_seed(0)
    shape = (channels, recipe.data.size, recipe.data.size)
    objective = recipe.objective.build(recipe.model.build(shape, World()), World(), 50)
    with torch.no_grad():
        for name, tensor in objective.state_dict().items():
            if "running" in name:
                tensor.add_(torch.rand_like(tensor))
            elif tensor.ndim > 1 and "codebook" not in name:
                torch.nn.init.kaiming_normal_(tensor)  # without which all images would give the same
    state = State(
        progress=Progress(2, 32), meters=[], scaling={}, data="ab" * 32, recipe=as_dict(recipe),
        weights={name: tensor.clone() for name, tensor in objective.state_dict().items()}, moments={},
    )  # fmt: skip
    Checkpoints(run / "checkpoints", 1).save(state)
    rows = [
        {"step": 1, "seen": 1, "eval/elbo": -9.0},
        {"step": 2, "seen": 2, "eval/elbo": -7.0, "train/loss": 8.0},
        {"step": 3, "seen": 3, "eval/elbo": 0.0},
    ]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (run / "pictures" / "step-00000002").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(run / "pictures" / "step-00000002" / "samples.png")
    return objective.eval()


def held_out(objective: Objective, shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Images of 8 bits, and what the objective makes of them: the posterior's mean, logvar, the mean's image."""
    bright = torch.tensor([1, 60, 120, 180, 256])[:, None, None, None]
    images = torch.randint(256, (5, *shape), generator=torch.Generator().manual_seed(1)).mul(bright).div(256).byte()
    low, high = objective.vae.pixel_range
    noise = Noise(0, torch.arange(5))
    with torch.no_grad():
        pixels = low + images / 255 * (high - low)
        mu, logvar = objective.vae.encode(pixels, noise)
        mean = objective.posterior(pixels, noise).mean
        decoded = (objective.likelihood.mean(objective.vae.decode(mean, noise)) - low) / (high - low)
    assert min(mu.std(0).min(), decoded.std(0).mean()) > 1e-3  # far above what is compared below
    return images, mean, logvar, decoded.clamp(0, 1)


def test_an_export_gives_what_the_training_gave_and_says_what_it_is(tmp_path, capsys):
    objective = trained("vae", run := tmp_path / "run")
    dst = tmp_path / "model"
    assert export.main([str(run), str(dst), "onnx=false"]) == 0
    images, mu, logvar, decoded = held_out(objective, (3, 64, 64))

    model = pretrained.load(dst)
    for found in (model.encode(images), model.encode(images / 255)):
        torch.testing.assert_close(found, (mu, logvar))
    torch.testing.assert_close(model.decode(mu), decoded)
    assert model.prior(7).shape == (7, 3)
    torch.testing.assert_close(tuple(torch.export.load(dst / "encoder.pt2").module()(images / 255)), (mu, logvar))
    torch.testing.assert_close(torch.export.load(dst / "decoder.pt2").module()(mu)[0], decoded)

    files = ["README.md", "config.json", "decoder.pt2", "encoder.pt2", "model.safetensors", "pictures"]
    assert sorted(path.name for path in dst.iterdir()) == files
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    config = json.loads((dst / "config.json").read_text())
    assert (config["shape"], config["step"], config["data"]["digest"]) == ([3, 64, 64], 2, "ab" * 32)
    _, front, text = (dst / "README.md").read_text().split("---\n", 2)
    (entry,) = yaml.safe_load(front)["model-index"]
    assert entry["results"][0]["metrics"] == [{"type": "elbo", "value": -7.0}]
    assert "![samples](pictures/samples.png)" in text
    assert f"Data set digest `{'ab' * 32}`" in text
    assert str(tmp_path) not in text  # which is of nobody else's machine
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["model"] == {
        "name": "conv64",
        "latent": 3,
        "hidden": 8,
    }
    assert "model.safetensors | 0.0e+00 |" in text
    assert "onnxruntime" not in text

    assert export.main([str(run), str(dst), "onnx=false"]) == 1
    assert capsys.readouterr().err == f"vaedist: {dst} exists: name another directory, or remove it\n"


@pytest.mark.slow
@pytest.mark.parametrize(("case", "channels"), [("vae", 1), ("factorvae", 3), ("qlae", 3), ("conv128", 3)])
def test_every_kind_of_model_is_exported_to_onnx_too(tmp_path, case, channels):
    import onnxruntime

    objective = trained(case, run := tmp_path / "run", channels)
    dst = tmp_path / "model"
    assert export.main([str(run), str(dst)]) == 0
    side = 128 if case == "conv128" else 64
    images, mean, logvar, decoded = held_out(objective, (channels, side, side))
    model = pretrained.load(dst)
    if case == "qlae":
        logvar = torch.full_like(logvar, -torch.inf)
        assert all((drawn[:, None] == model.codebook.values).any(1).all() for drawn in model.prior(9))
    torch.testing.assert_close(model.encode(images), (mean, logvar))
    torch.testing.assert_close(model.decode(mean), decoded)
    for name, inputs, expected in (("encoder", images / 255, (mean, logvar)), ("decoder", mean, (decoded,))):
        found = torch.export.load(dst / f"{name}.pt2").module()(inputs)
        torch.testing.assert_close(tuple(found), expected, rtol=1e-4, atol=1e-5)
        session = onnxruntime.InferenceSession(dst / f"{name}.onnx")
        (entry,) = session.get_inputs()
        found = tuple(torch.from_numpy(output) for output in session.run(None, {entry.name: inputs.numpy()}))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert entry.name == {"encoder": "images", "decoder": "z"}[name]


def test_averaged_weights_are_preferred_and_a_discriminator_stays_behind(tmp_path):
    trained("factorvae", run := tmp_path / "run")
    checkpoints = Checkpoints(run / "checkpoints", 1)
    snapshot = checkpoints.newest(print)
    mean = {f"{name}{EMA}": torch.full_like(value, 0.25) for name, value in snapshot.weights.items()}
    checkpoints.save(
        State(**{name: getattr(snapshot, name) for name in State.__dataclass_fields__} | {"moments": mean})
    )
    (tmp_path / "draft").mkdir()
    model, shape = export.write_model(checkpoints.newest(print), run, tmp_path / "draft")
    assert shape == [3, 64, 64]
    for found in (model, pretrained.load(tmp_path / "draft")):
        assert {value for tensor in found.state_dict().values() for value in tensor.unique().tolist()} == {0.25}
        assert {name.partition(".")[0] for name in found.state_dict()} == {"vae"}


def test_programs_that_differ_from_the_model_are_not_exported(tmp_path, monkeypatch, capsys):
    def wrong(model, loaded, shape, draft, onnx):
        (draft / "encoder.pt2").write_bytes(b"")
        raise ConfigError("encoder.pt2 differs")

    trained("vae", run := tmp_path / "run")
    monkeypatch.setattr(export, "write_programs", wrong)
    assert export.main([str(run), str(tmp_path / "model")]) == 1
    assert capsys.readouterr().err == "vaedist: encoder.pt2 differs\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_difference_is_absolute_up_to_one_relative_above_and_none_between_equal_infinities():
    point = torch.tensor([-torch.inf, 0.5])
    assert programs.distance([point], [point.clone()]) == 0
    assert programs.distance([point], [torch.tensor([-torch.inf, 0.25])]) == 0.25
    assert programs.distance([torch.tensor([100.0, 1.0])], [torch.tensor([100.0, 2.0])]) == pytest.approx(0.01)
    assert not programs.distance([point], [torch.tensor([0.0, 0.5])]) <= programs.BOUND
    assert not programs.distance([point], [torch.tensor([torch.nan, 0.5])]) <= programs.BOUND


def test_what_cannot_be_exported_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    def said(*words: str) -> str:
        assert export.main([str(tmp_path), str(tmp_path / "model"), *words]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert said().endswith("there is no checkpoint to export; train the run first")
    assert "onyx=false is no option; did you mean onnx" in said("onyx=false")
    assert "onnx=no is not true or false" in said("onnx=no")
    assert "push=a//b is no repository's name" in said("push=a//b")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert said() == "vaedist: ONNX needs onnx, onnxscript, onnxruntime: pip install 'vaedist[onnx]', or say onnx=false"
    assert export.main([str(tmp_path)]) == 2


@pytest.mark.parametrize("damage", ["cut off", "another model", "another format", "other weights", "no directory"])
def test_what_is_no_export_is_refused_when_it_is_loaded(tmp_path, damage):
    trained("vae", run := tmp_path / "run")
    (draft := tmp_path / "draft").mkdir()
    export.write_model(Checkpoints(run / "checkpoints", 1).newest(print), run, draft)
    pretrained.load(draft)
    config = json.loads((draft / "config.json").read_text())
    changed = {
        "another model": {"model": {"name": "os"}},
        "another format": {"format": "x"},
        "other weights": {"shape": [1, 64, 64]},
    }
    (draft / "config.json").write_text(json.dumps(config | changed.get(damage, {})))
    if damage == "cut off":
        (draft / "model.safetensors").write_bytes((draft / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(
        ConfigError, match="of format x, this program" if damage == "another format" else "not an exported"
    ):
        pretrained.load(draft / "there" if damage == "no directory" else draft)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a push of small files sees; `commits` are what it was given."""

    commits: list[dict[str, bytes]]
    created: list[dict[str, object]]

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        address = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            self.created.append(json.loads(content))
            self.answer({"url": f"{address}/user/name"})
        elif self.path == "/api/models/user/name/preupload/main":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            self.answer({"files": files})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path == "/api/models/user/name/commit/main":
            lines = [json.loads(line)["value"] for line in content.splitlines()][1:]
            self.commits.append({line["path"]: base64.b64decode(line["content"]) for line in lines})
            self.answer({"commitUrl": f"{address}/user/name/commit/1", "commitOid": "1", "hookOutput": ""})
        else:
            self.send_error(404)

    def do_GET(self) -> None:
        self.answer({"id": "user/name", "sha": "0", "siblings": []})

    def answer(self, found: object) -> None:
        content = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub(monkeypatch):
    """Where the hub's own client finds it."""
    Hub.commits, Hub.created = [], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_a_push_uploads_every_file_and_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    files = {"README.md": b"a card", "pictures/samples.png": np.arange(99, dtype=np.uint8).tobytes()}
    (tmp_path / "pictures").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with hub(monkeypatch) as address:
        assert export.push(tmp_path, "user/name") == f"{address}/user/name"
    assert Hub.commits == [files]
    assert (Hub.created[0]["name"], Hub.created[0]["visibility"]) == ("name", "private")
    with pytest.raises(ConfigError, match=f"written, but not pushed .*: hf upload --private user/name {tmp_path}$"):
        export.push(tmp_path, "user/name")  # the server is gone
