"""The model card of an export: what it is, how to use it, its numbers and pictures, and the recipe."""

import json
import shutil
from pathlib import Path
from typing import Any

from shards.remote.fetch import set_name
from vaedist import rows
from vaedist.checkpoint import Snapshot
from vaedist.config import ConfigError
from vaedist.pictures import FORMATS
from vaedist.pretrained import CONFIG
from vaedist.words import to_yaml

PICTURES = "pictures"
MAKERS = ("seed", "data", "model", "objective", "optimizer", "train")  # the sections of a recipe that make a model
ORDER = ("reconstructions", "samples", "traversals")  # of the pictures; others follow
TASK = "unconditional-image-generation"  # of the hub's

TEXT = """
# {name}

{about}

## Use

```python
from vaedist import pretrained          # of the repository that trained it; reads JSON and safetensors only

model = pretrained.load("path/to/this/directory")
mu, logvar = model.encode(images)       # uint8, or float in [0, 1]: [batch, {channels}, {height}, {width}]
images = model.decode(mu)               # [batch, {latent}] -> float in [0, 1]
images = model.decode(model.prior(16))  # samples
```

Without that repository, for any batch size:

```python
import torch

encoder = torch.export.load("encoder.pt2").module()
mu, logvar = encoder(images)            # float32 in [0, 1]
decoder = torch.export.load("decoder.pt2").module()
(images,) = decoder(mu)
{onnx}```

{input}

## Numbers

{numbers}

## Pictures

{pictures}

## Files

| file | largest difference from the checkpoint's model |
|---|---|
{files}

## Recipe

Data set digest `{digest}`{commit}.

```yaml
{recipe}```
"""
RUNTIME = """
import onnxruntime

session = onnxruntime.InferenceSession("encoder.onnx")
mu, logvar = session.run(None, {"images": images.numpy()})
session = onnxruntime.InferenceSession("decoder.onnx")
(images,) = session.run(None, {"z": mu})
"""
NUMBERS = """Of held-out images after step {at:,}; elbo, recon and kl in nats per image.

| | |
|---|---|
"""


def write(draft: Path, run: Path, snapshot: Snapshot, differences: dict[str, float]) -> None:
    """README.md and the pictures it shows, beside the exported files."""
    config = json.loads((draft / CONFIG).read_text())
    at, numbers = evaluation(run, snapshot.progress.step)
    pictures = copy_pictures(run, at, draft)
    name = run.resolve().name
    channels, height, width = config["shape"]
    crop, commit = config["input"]["crop"], config["trained_with"].get("commit")
    table = "\n".join(f"| {key} | {value:,.4g} |" for key, value in numbers.items())
    text = TEXT.format(
        name=name,
        about=about(config, snapshot.recipe["train"]["batch"]),
        latent=config["latent"],
        channels=channels,
        height=height,
        width=width,
        onnx=RUNTIME if "encoder.onnx" in differences else "",
        input=f"Images are the {'largest centre square' if crop is None else f'centre {crop} pixels'} of the "
        f"originals, scaled to {width} x {height} pixels with antialiasing.",
        numbers=f"{NUMBERS.format(at=at)}{table}" if numbers else "This run was not evaluated.",
        pictures="\n\n".join(f"{path.stem}:\n\n![{path.stem}]({PICTURES}/{path.name})" for path in pictures)
        or "This run drew none.",
        files="\n".join(f"| {file} | {difference:.1e} |" for file, difference in differences.items()),
        digest=snapshot.data,
        commit=f", commit `{commit}`" if commit else "",
        recipe=to_yaml(public(snapshot.recipe)),
    )
    (draft / "README.md").write_text(f"---\n{front_matter(name, config, numbers)}\n---\n{text}")


def public(recipe: dict[str, Any]) -> dict[str, Any]:
    """What made the model, without what it was called and where things lay on somebody's machine."""
    sections = {name: recipe[name] for name in MAKERS}
    kept = {key: value for key, value in recipe["data"].items() if key in ("size", "crop", "flip", "window")}
    return sections | {"data": {"shards": set_name(recipe["data"]["shards"])} | kept}


def about(config: dict[str, Any], batch: int) -> str:
    """What the model is, in a few sentences."""
    channels, height, width = config["shape"]
    model, objective, data = config["model"]["name"], config["objective"]["name"], config["data"]["name"]
    sentences = [
        f"A variational autoencoder (`{model}`, {config['latent']} latents) of {width} x {height} images with "
        f"{channels} channels, trained with the objective `{objective}` on the set `{data}` for {config['step']:,} "
        f"steps of {batch} images."
    ]
    if config["averaged"]:
        sentences.append("Its weights are averages over the steps.")
    if config["codebook"]:
        sentences.append(
            f"Each latent takes one of {config['codebook']} values (`codebook.values` in `model.safetensors`): `mu` is "
            "the code, and `logvar` minus infinity."
        )
    return "\n".join(sentences)


def front_matter(name: str, config: dict[str, Any], numbers: dict[str, float]) -> str:
    """What the hub reads, YAML."""
    from huggingface_hub import EvalResult, ModelCardData

    data = config["data"]["name"]
    results = [
        EvalResult(task_type=TASK, dataset_type=data, dataset_name=data, metric_type=key, metric_value=value)
        for key, value in numbers.items()
    ]
    tags = ["vae", config["model"]["name"], config["objective"]["name"]]
    plain = ModelCardData(
        library_name="vaedist", pipeline_tag=TASK, tags=tags, model_name=name, eval_results=results or None
    )
    return plain.to_yaml()


def evaluation(run: Path, step: int) -> tuple[int, dict[str, float]]:
    """The newest numbers of held-out images up to a step, by name, and the step they are of."""
    known = [row for path in run.glob("metrics.jsonl") for row in rows.read(path)]
    known += [rows.parsed(path.read_bytes(), str(path)) for path in run.glob("evaluation/step-*/metrics.json")]
    known = [row for row in known if row["step"] <= step and any(key.startswith("eval/") for key in row)]
    at = max((row["step"] for row in known), default=step)
    found: dict[str, float] = {}
    for row in known:
        if row["step"] == at:
            found |= {key.removeprefix("eval/"): value for key, value in row.items() if key.startswith("eval/")}
    return at, found


def copy_pictures(run: Path, step: int, draft: Path) -> list[Path]:
    """Copies the pictures of a step; the copies, the usual ones first."""
    copies = []
    for name in (PICTURES, "evaluation"):
        for path in sorted((run / name / f"step-{step:08d}").glob("*")):
            if path.suffix[1:] in FORMATS:
                (draft / PICTURES).mkdir(exist_ok=True)
                copies.append(Path(shutil.copy(path, draft / PICTURES)))
    order = {name: place for place, name in enumerate(ORDER)}
    return sorted(set(copies), key=lambda path: (order.get(path.stem, len(ORDER)), path.name))


def last_start(run: Path) -> dict[str, Any]:
    """What environment.json says of the run's last start; nothing where it is not there."""
    path = run / "environment.json"
    if not path.exists():
        return {}
    try:
        last: dict[str, Any] = json.loads(path.read_text())[-1]
    except (ValueError, LookupError) as error:
        raise ConfigError(f"{path}: not a list of starts ({error}); move the file away") from None
    return last
