"""Runs sorted into configurations: those that differ only in their seed are one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from vaedist.compare.metrics import Spread, best, direction
from vaedist.compare.runs import Curve, Run

# What does not make another configuration: the seed, where things lie, and when a run looks, saves and reports.
APART = (
    "run", "seed", "data.draw", "data.store", "data.cache", "data.pipe", "data.instead_of", "train.timeout",
    "evaluate.every", "evaluate.names", "evaluate.attributes", "evaluate.batch", "evaluate.inception",
    "checkpoint.", "track.", "debug.",
)  # fmt: skip
# Where these differ, the numbers are not of the same images or not in the same units.
GROUND = ("data.shards", "data.size", "data.crop", "objective.likelihood", "objective.scale", "evaluate.images")


@dataclass(frozen=True)
class Configuration:
    number: int
    label: str
    said: dict[str, str]  # the keys that differ, those that its recipe has
    runs: tuple[Run, ...]

    def curves(self, metric: str) -> list[Curve]:
        """Those that have come as far as the one that is farthest: what lags behind does not count."""
        found = [run.curves[metric] for run in self.runs if metric in run.curves]
        last = max((curve[-1].step for curve in found), default=0)
        return [curve for curve in found if curve[-1].step == last]

    def final(self, metric: str) -> Spread | None:
        curves = self.curves(metric)
        return Spread.of([curve[-1] for curve in curves]) if curves else None

    def best(self, metric: str) -> Spread | None:
        """Of each run its best, wherever that is; None where nothing says what is better."""
        curves, sign = self.curves(metric), direction(metric)
        return Spread.of([best(curve, sign) for curve in curves]) if curves and sign else None

    def mean(self, metric: str) -> list[tuple[int, float]]:
        """Images seen and the mean over the runs, where all that count have been."""
        curves = [{point.seen: point.value for point in curve} for curve in self.curves(metric)]
        common = sorted(set.intersection(*map(set, curves))) if curves else []
        return [(seen, sum(curve[seen] for curve in curves) / len(curves)) for seen in common]


class Comparison:
    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        recipes = _comparable(runs)
        self.keys = [key for key in _keys(recipes) if _differs(key, recipes)]
        groups: dict[tuple[str | None, ...], list[Run]] = {}
        for run, recipe in zip(runs, recipes, strict=True):
            groups.setdefault(tuple(map(recipe.get, self.keys)), []).append(run)
        # without the keys of one component that nobody varied: its name says as much
        self.telling = [key for key in self.keys if len({recipe[key] for recipe in recipes if key in recipe}) > 1]
        self.configurations = []
        for number, (values, same) in enumerate(groups.items(), 1):
            said = {key: value for key, value in zip(self.keys, values, strict=True) if value is not None}
            words = [f"{key.removesuffix('.name')}={said[key]}" for key in self.telling if key in said]
            label = " ".join([f"{number}:", *words]) if words else str(number)
            self.configurations.append(Configuration(number, label, said, tuple(same)))

    @cached_property
    def metrics(self) -> list[str]:
        """All that any run has."""
        return sorted({name for run in self.runs for name in run.curves})

    def winners(self, metric: str) -> set[int]:
        """The numbers of the configurations whose final mean is best; none where they do not compare."""
        found = {configuration.number: configuration.final(metric) for configuration in self.configurations}
        means = {number: direction(metric) * spread.mean for number, spread in found.items() if spread}
        steps = {spread.steps for spread in found.values() if spread}
        if not direction(metric) or len(means) < 2 or len(steps) > 1 or set(GROUND) & set(self.keys):
            return set()
        return {number for number, mean in means.items() if mean == max(means.values())}

    def notes(self, metrics: Sequence[str]) -> Iterator[str]:
        """What a reader of the numbers must know."""
        for run in self.runs:
            if not run.complete:
                yield f"incomplete: {run.name} is at step {run.step:,} of {run.steps:,}"
        for configuration in self.configurations:
            few = {metric: len(configuration.curves(metric)) for metric in metrics}
            if any(0 < n < len(configuration.runs) for n in few.values()):
                yield f"{configuration.number}: the means are of the runs that are farthest, (n of all)"
            seeds = [run.seed for run in configuration.runs]
            for seed in sorted({seed for seed in seeds if seeds.count(seed) > 1}):
                yield f"{configuration.number}: {seeds.count(seed)} of its runs have the same seed, {seed}"
        uneven: dict[str, list[str]] = {}
        for metric in metrics:
            found = {row.number: spread.steps[0] for row in self.configurations if (spread := row.final(metric))}
            if len(set(found.values())) > 1:
                where = ", ".join(f"{number} at {step}" for number, step in found.items())
                uneven.setdefault(where, []).append(metric)
        for where, names in uneven.items():
            yield f"not of the same step ({where}): {', '.join(names)}"
        ground = [key for key in GROUND if key in self.keys]
        if ground:
            yield f"{', '.join(ground)} differ: the numbers do not compare, and none is marked as the best"


def _comparable(runs: Sequence[Run]) -> list[dict[str, str]]:
    """The recipes without what is apart; a data set is its digest, by the first name that a run has for it."""
    names: dict[str, str] = {}
    for run in runs:
        name = run.recipe.get("data.shards", run.data)
        names.setdefault(run.data, f"{name} ({run.data[:8]})" if name in names.values() else name)
    kept = [{key: value for key, value in run.recipe.items() if not key.startswith(APART)} for run in runs]
    return [recipe | {"data.shards": names[run.data]} for run, recipe in zip(runs, kept, strict=True)]


def _keys(recipes: Sequence[Mapping[str, str]]) -> list[str]:
    """Those of any, section by section."""
    found = dict.fromkeys(key for recipe in recipes for key in recipe)
    sections = list(dict.fromkeys(key.partition(".")[0] for key in found))
    return sorted(found, key=lambda key: sections.index(key.partition(".")[0]))


def _differs(key: str, recipes: Sequence[Mapping[str, str]]) -> bool:
    """Whether it has several values; to lack one counts only where another component is in its place."""
    component = f"{key.partition('.')[0]}.name"
    values = {recipe.get(key) for recipe in recipes}
    if len({recipe.get(component) for recipe in recipes}) == 1:
        values.discard(None)  # the option is younger than the run
    return len(values) > 1
