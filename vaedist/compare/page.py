"""The comparison as one page that opens without a network: tables, interactive curves and pictures."""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vaedist.compare.comparison import Comparison
from vaedist.compare.records import record
from vaedist.compare.runs import Picture, Run
from vaedist.compare.table import columns

HERE = Path(__file__).parent
POINTS = 500  # of a curve
VIEWS = 6  # steps at which pictures are shown
BYTES = 60_000_000  # of all pictures


def page(comparison: Comparison, metrics: Sequence[str]) -> bytes:
    from plotly.offline import get_plotlyjs

    found = record(comparison, metrics)
    for one in [*found["runs"], *found["configurations"]]:
        one["curves"] = {metric: _thinned(curve) for metric, curve in one["curves"].items()}
        one.pop("recipe", None)
    found["table"] = [
        {"name": "\n".join(column.header), "cells": [cell._asdict() for cell in column.cells]}
        for column in columns(comparison, metrics)
    ]
    runs = [run for row in comparison.configurations for run in row.runs]
    found["pictures"] = album(runs)
    found["about"] = f"{len(runs)} runs in {len(comparison.configurations)} configurations"
    parts = {
        "plotly": get_plotlyjs(),
        "script": (HERE / "page.js").read_text(),
        "data": json.dumps(found, allow_nan=False).replace("<", "\\u003c"),  # no text of a file ends the element
    }
    return re.sub(r"{{(\w+)}}", lambda part: parts[part[1]], (HERE / "page.html").read_text()).encode()


def album(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every picture at some steps that all runs with it have in common, or the last of each run if there is none.

    The last steps come first until `BYTES` are full; what finds no room has no `source`, and no view is without any.
    """
    views = {name: _views(name, runs) for name in sorted({name for run in runs for name in run.pictures})}
    room = BYTES
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in views}
    for back in range(VIEWS):
        for name, steps in views.items():
            if back < len(steps):
                title, pictures = steps[-1 - back]
                shown = []
                for run, (step, picture) in pictures.items():
                    content = picture.read() if room else b""
                    fits = 0 < len(content) <= room
                    room -= min(len(content), room)  # once full it stays full
                    shown.append({"run": run, "step": step, "source": _embedded(picture, content) if fits else None})
                if any(one["source"] for one in shown):
                    found[name].insert(0, {"title": title, "pictures": shown})
    return [{"name": name, "views": views} for name, views in found.items() if views]


View = tuple[str, Mapping[int, tuple[int, Picture]]]  # its title; step and picture by the number of the run


def _views(name: str, runs: Sequence[Run]) -> list[View]:
    having = {number: run.pictures[name] for number, run in enumerate(runs) if name in run.pictures}
    common = sorted(set.intersection(*map(set, having.values())))
    if not common:
        return [("the last of each run", {n: max(own.items(), key=lambda item: item[0]) for n, own in having.items()})]
    return [(f"step {step:,}", {n: (step, own[step]) for n, own in having.items()}) for step in _spread(common)]


def _spread(steps: Sequence[int]) -> list[int]:
    """The last one, and others at even distances."""
    every = max(1, (len(steps) + VIEWS - 1) // VIEWS)
    return list(steps[::-1][::every][::-1])


def _embedded(picture: Picture, content: bytes) -> str:
    return f"data:image/{picture.kind};base64,{base64.b64encode(content).decode()}"


def _thinned(curve: dict[str, list[float]]) -> dict[str, list[float]]:
    """Evenly, with its last point."""
    every = max(1, (len(next(iter(curve.values()))) + POINTS - 1) // POINTS)
    return {name: values[::-1][::every][::-1] for name, values in curve.items()}
