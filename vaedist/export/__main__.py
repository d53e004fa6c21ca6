"""python -m vaedist.export RUN DST [push=USER/NAME] [onnx=false]    a run's newest checkpoint, for use without it"""

import json
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from shards.remote.fetch import set_name
from vaedist.checkpoint import CheckpointError, Checkpoints, Snapshot, averaged
from vaedist.config import ConfigError
from vaedist.export import card
from vaedist.export.programs import write_programs
from vaedist.pretrained import CONFIG, FORMAT, WEIGHTS, Pretrained, build, load
from vaedist.tensorfile import pieces
from vaedist.words import from_words, is_setting, nearest

ONNX = ("onnx", "onnxscript", "onnxruntime")
USAGE = "usage: python -m vaedist.export RUN DST [push=USER/NAME] [onnx=false]"


def main(arguments: Sequence[str]) -> int:
    """The exit status: 1 after one line that says what is wrong."""
    if len(arguments) < 2 or any(map(is_setting, arguments[:2])):
        print(USAGE, file=sys.stderr)
        return 2
    run, dst = map(Path, arguments[:2])
    try:
        repository, onnx = options(arguments[2:])
        export(run, dst, onnx)
        if repository:
            print(f"{dst}: pushed to {push(dst, repository)}")
    except (ConfigError, CheckpointError, OSError) as error:
        print(f"vaedist: {error}", file=sys.stderr)
        return 1
    return 0


def options(words: Sequence[str]) -> tuple[str | None, bool]:
    """The repository to push to, and whether ONNX files are wanted. Raises ConfigError."""
    said = from_words(words).section()
    for key, node in said.items():
        if key not in ("push", "onnx"):
            raise node.wrong(key, f"is no option; {nearest(key, ('push', 'onnx'))}")
    onnx = said.get("onnx")
    if onnx and str(onnx) not in ("true", "false"):
        raise onnx.wrong("onnx", "is not true or false")
    wanted = str(onnx) != "false"
    if wanted and (missing := [name for name in ONNX if find_spec(name) is None]):
        raise ConfigError(f"ONNX needs {', '.join(missing)}: pip install 'vaedist[onnx]', or say onnx=false")
    if "push" in said:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(str(said["push"]))
        except HFValidationError as error:
            raise said["push"].wrong("push", f"is no repository's name: {error}") from None
    return str(said["push"]) if "push" in said else None, wanted


def export(run: Path, dst: Path, onnx: bool) -> None:
    """Writes DST whole or not at all. Raises ConfigError, CheckpointError or OSError."""
    if dst.exists():
        raise ConfigError(f"{dst} exists: name another directory, or remove it")
    snapshot = Checkpoints(run / "checkpoints", 1).newest(print)
    if snapshot is None:
        raise CheckpointError(f"{run}: there is no checkpoint to export; train the run first")
    with whole(dst) as draft:
        model, shape = write_model(snapshot, run, draft)
        differences = write_programs(model, load(draft), shape, draft, onnx)
        for name, difference in differences.items():
            size = (draft / name).stat().st_size / 1e6
            print(f"{name:<20}{size:>8.1f} MB  differs from the checkpoint's model by {difference:.1e} at most")
        card.write(draft, run, snapshot, differences)
    print(f"{dst}: step {snapshot.progress.step} of {run}, see {dst}/README.md")


def write_model(snapshot: Snapshot, run: Path, draft: Path) -> tuple[Pretrained, list[int]]:
    """CONFIG, and in WEIGHTS what encoding and decoding need, float32: of a run with train.ema the averaged weights.

    The model, and the shape of its images.
    """
    mean = averaged(snapshot.moments)
    weights = {
        name: tensor.float().contiguous()
        for name, tensor in (snapshot.weights | mean).items()
        if name.startswith(("vae.", "codebook."))
    }
    recipe, last = snapshot.recipe, card.last_start(run)
    model, shape = sized(recipe, weights)
    config = {
        "format": FORMAT,
        "model": recipe["model"],
        "shape": shape,
        "latent": model.vae.latent,
        "pixel_range": model.vae.pixel_range,
        "codebook": None if model.codebook is None else model.codebook.values.shape[1],
        "objective": recipe["objective"],
        "input": {"pixels": [0.0, 1.0], "crop": recipe["data"]["crop"], "size": recipe["data"]["size"]},
        "data": {"name": set_name(recipe["data"]["shards"]), "digest": snapshot.data},
        "step": snapshot.progress.step,
        "seen": snapshot.progress.seen,
        "averaged": bool(mean),
        "trained_with": {key: last[key] for key in ("commit", "packages") if key in last},
        "exported_with": {"torch": version("torch")},
    }
    with (draft / WEIGHTS).open("wb") as file:
        file.writelines(pieces(weights))
    (draft / CONFIG).write_text(f"{json.dumps(config, indent=1)}\n")
    return model, shape


def sized(recipe: dict[str, Any], weights: dict[str, Tensor]) -> tuple[Pretrained, list[int]]:
    """The model, and the shape of its images, of whose channels only data set and weights know whether they are 3 or 1.

    Raises ConfigError where this program has no such model.
    """
    size, tried = recipe["data"]["size"], []
    for shape in ([3, size, size], [1, size, size]):
        try:
            return build(recipe | {"shape": shape}, weights), shape
        except (RuntimeError, ValueError, TypeError) as error:
            tried.append(" ".join(str(error).split()))
    raise ConfigError(f"model.name={recipe['model']['name']}: these weights are of another program's: {tried[0]}")


@contextmanager
def whole(dst: Path) -> Iterator[Path]:
    """A new directory that takes the name `dst` only once it is complete; on an error it vanishes."""
    draft = dst.with_name(f".{dst.name}.{secrets.token_hex(4)}.draft")
    draft.mkdir(parents=True)
    try:
        yield draft
        draft.rename(dst)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def push(dst: Path, repository: str) -> str:
    """Uploads DST to the Hugging Face hub, into a repository that is private if it is new; its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    hub = HfApi()
    try:
        repository = hub.create_repo(repository, private=True, exist_ok=True).repo_id
        commit = hub.upload_folder(repo_id=repository, folder_path=dst, commit_message="Exported by vaedist")
    except (HTTPError, OSError, ValueError) as error:  # no network, no login, no right to write there, a proxy's page
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{dst} is written, but not pushed ({reason}); when online and logged in (`hf auth login`): "
            f"hf upload --private {repository} {dst}"
        ) from error
    return str(commit.repo_url)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
