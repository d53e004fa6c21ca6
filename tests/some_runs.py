"""Run directories as training leaves them, written by hand: what is compared needs no training."""

import json
from pathlib import Path
from typing import Any

import yaml

Numbers = dict[str, list[float]]  # by metric, at steps 10, 20, ...


def recipe(**changes: Any) -> dict[str, Any]:
    """A short one; `objective__beta=4` changes objective.beta, a section replaces a section."""
    whole = {
        "run": "runs/x",
        "seed": 0,
        "data": {"shards": "data/x", "size": 64, "cache": "~/.cache"},
        "objective": {"name": "betavae", "likelihood": "bernoulli", "beta": 4.0},
        "optimizer": {"lr": 0.0005, "betas": [0.9, 0.999]},
        "train": {"steps": 30, "batch": 8},
        "evaluate": {"every": 10, "images": None},
        "track": {"project": "p", "entity": None},
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        place: Any = whole
        for section in sections:
            place = place[section]
        place[name] = value
    return whole


def write(run: Path, numbers: Numbers, *, data: str = "d" * 64, **changes: Any) -> Path:
    """The run directory `run` whose rows have these numbers."""
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe(run=str(run), **changes), sort_keys=False))
    (run / "environment.json").write_text(json.dumps([{"step": 0, "data": data}]))
    rows: dict[int, dict[str, float]] = {}
    for metric, values in numbers.items():
        for step, value in enumerate(values, 1):
            rows.setdefault(10 * step, {"step": 10 * step, "seen": 80 * step})[metric] = value
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows.values()))
    return run


def draw(run: Path, name: str, step: int, content: bytes, place: str = "pictures") -> None:
    """A picture of that step, whatever its bytes."""
    path = run / place / f"step-{step:08d}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
