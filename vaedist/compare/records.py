"""The comparison for other programs: as JSON, with every recipe and curve, and as CSV."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from vaedist.compare.comparison import Comparison, Configuration
from vaedist.compare.metrics import Spread
from vaedist.compare.runs import Run


def record(comparison: Comparison, metrics: Sequence[str]) -> dict[str, Any]:
    """What JSON keeps; `final` and `best` have the chosen metrics, `curves` all."""
    rows = comparison.configurations
    return {
        "differs": comparison.keys,
        "telling": comparison.telling,
        "metrics": list(metrics),
        "configurations": [_configuration(row, metrics, comparison.metrics) for row in rows],
        "runs": [_run(run, row, metrics) for row in rows for run in row.runs],
        "notes": list(comparison.notes(metrics)),
    }


def as_json(comparison: Comparison, metrics: Sequence[str]) -> bytes:
    return f"{json.dumps(record(comparison, metrics), indent=1, allow_nan=False)}\n".encode()


def as_csv(comparison: Comparison, metrics: Sequence[str]) -> bytes:
    """A run's row has its name; a configuration's has none, its numbers are means over `n` runs with deviations."""
    rows = [_row(row, metrics) for row in comparison.configurations]
    for row in comparison.configurations:
        for run in row.runs:
            own = _row(replace(row, runs=(run,)), metrics)
            rows.append(own | {"run": run.name, "seed": run.seed, "step": run.step})
    numbers = [
        f"{metric}{part}" for metric in metrics for part in ("", " std", " n", " best", " best std", " best step")
    ]
    names = ["configuration", "run", "seed", "n", "step", *comparison.keys, *numbers]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [name for name in names if any(name in row for row in rows)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def _row(row: Configuration, metrics: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"configuration": row.number, "n": len(row.runs), **row.said}
    for metric in metrics:
        if final := row.final(metric):
            found |= {metric: final.mean, f"{metric} n": final.n} | _deviation(metric, final)
        if best := row.best(metric):
            found |= {f"{metric} best": best.mean} | _deviation(f"{metric} best", best)
            if len(best.steps) == 1:
                found[f"{metric} best step"] = best.steps[0]
    return found


def _deviation(name: str, spread: Spread) -> dict[str, float]:
    return {} if spread.std is None else {f"{name} std": spread.std}


def _configuration(row: Configuration, metrics: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    means = {metric: mean for metric in known if (mean := row.mean(metric))}
    return {
        "configuration": row.number,
        "label": row.label,
        "differs": row.said,
        "n": len(row.runs),
        "seeds": [run.seed for run in row.runs],
        **_numbers(row, metrics),
        "curves": {metric: _columns(("seen", "mean"), mean) for metric, mean in means.items()},
    }


def _run(run: Run, row: Configuration, metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "run": run.name,
        "configuration": row.number,
        "seed": run.seed,
        "step": run.step,
        "steps": run.steps,
        "complete": run.complete,
        "data": run.data,
        "recipe": run.recipe,
        **_numbers(replace(row, runs=(run,)), metrics),
        "curves": {metric: _columns(("step", "seen", "value"), curve) for metric, curve in run.curves.items()},
    }


def _numbers(row: Configuration, metrics: Sequence[str]) -> dict[str, Any]:
    return {
        "final": {metric: asdict(spread) for metric in metrics if (spread := row.final(metric))},
        "best": {metric: asdict(spread) for metric in metrics if (spread := row.best(metric))},
    }


def _columns(names: Sequence[str], rows: Sequence[tuple[float, ...]]) -> dict[str, list[float]]:
    return {name: list(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
