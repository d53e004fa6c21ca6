"""Who may import whom, read from the files: the reasons are in the files' own first lines."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path.relative_to(ROOT) for package in ("shards", "vaedist") for path in (ROOT / package).rglob("*.py"))
OWNERS = {  # only these files know the package
    "accelerate": ("vaedist/backend.py", "vaedist/zero.py"),
    "deepspeed": ("vaedist/zero.py",),
    "h5py": ("shards/sources/official.py",),
    "simplejpeg": ("shards/image.py",),
    "torch.distributed": ("vaedist/backend.py", "vaedist/world.py"),
    "wandb": ("vaedist/wandb_view.py", "vaedist/compare/online.py"),
    "webdataset": ("shards/", "vaedist/data/"),
    "yaml": ("vaedist/words.py",),
}
COMPONENTS = ("vaedist/objectives/", "vaedist/models/", "vaedist/data/", "vaedist/evaluators/")


@cache
def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def knows(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in imports(path))


@pytest.mark.parametrize("package", OWNERS)
def test_a_package_is_known_to_its_owners_alone(package):
    assert [str(path) for path in FILES if knows(path, package) and not str(path).startswith(OWNERS[package])] == []
    assert any(knows(path, package) for path in FILES)


def test_no_component_knows_the_trainer_or_the_recipe():
    late = ("vaedist.trainer", "vaedist.recipe", "vaedist.train")
    users = {str(path) for path in FILES if any(knows(path, module) for module in late)}
    commands = {f"vaedist/{name}.py" for name in ("train", "evaluate", "edit/__main__", "udr")}
    training = {f"vaedist/{name}.py" for name in ("trainer", "session", "replicas/files", "replicas/run")}
    assert users == training | commands


def test_objectives_know_mathematics_only():
    allowed = {"aggregate", "gaussian", "likelihood", "posterior", "world"}
    allowed |= {"branch", "config", "layers", "models", "noise", "objectives"}
    for path in FILES:
        if str(path).startswith("vaedist/objectives/"):
            ours = {name.split(".")[1] for name in imports(path) if name.startswith("vaedist.") and name.count(".")}
            assert ours <= allowed, path


def test_the_format_of_the_shards_does_not_know_the_training():
    assert [str(path) for path in FILES if path.parts[0] == "shards" and knows(path, "vaedist")] == []


def test_a_pretrained_model_is_used_without_the_trainer():
    reached, ahead = set(), {"vaedist.pretrained"}
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    while ahead:
        name = ahead.pop()
        reached.add(name)
        if name in modules:
            ahead |= imports(modules[name]) - reached
    assert "vaedist.models" in reached
    apart = ("accelerate", "deepspeed", "shards", "wandb", "webdataset", "vaedist.backend", "vaedist.trainer")
    assert [name for name in reached if name.startswith(apart)] == []


def test_packing_and_reading_do_not_wait_for_torch_to_be_imported():
    script = "import sys, shards.__main__, shards.reading.reader; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_mathematics_never_asks_for_the_rank():
    for path in FILES:
        if str(path).startswith((*COMPONENTS[:2], "vaedist/gaussian", "vaedist/likelihood", "vaedist/layers")):
            assert ".rank" not in (ROOT / path).read_text(), path


def test_no_file_of_vaedist_hides_a_module_of_the_standard_library_or_a_package():
    """`accelerate launch vaedist/train.py` puts the directory itself first on the path."""
    packages = {
        "torch",
        "torchvision",
        "accelerate",
        "wandb",
        "webdataset",
        "yaml",
        "numpy",
        "PIL",
        "safetensors",
        "tqdm",
    }
    names = {path.stem for path in (ROOT / "vaedist").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names & (set(sys.stdlib_module_names) | packages) == set()


def test_every_file_says_in_one_sentence_what_it_is_for():
    for path in FILES:
        text = (ROOT / path).read_text()
        assert not text.strip() or ast.get_docstring(ast.parse(text)), path
