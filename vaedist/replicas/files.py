"""What several runs leave on the disk and on W&B, each its own: rows taken apart, and put together at a resume."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from vaedist.checkpoint import CheckpointError, Checkpoints, DamagedError, Snapshot, State
from vaedist.config import as_dict
from vaedist.recipe import Recipe
from vaedist.tracker import Tracker


def apart(values: Mapping[str, Any], number: int) -> dict[str, Any]:
    """One replica's part of what all have: of lists its item, anything else as it is."""
    return {name: value[number] if isinstance(value, list) else value for name, value in values.items()}


def merged(rows: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, list[Any]]]:
    """The rows of every replica as rows of lists: the last ones, where one was trained alone and logged elsewhere."""
    count = min(map(len, rows))
    steps = zip(*(own[len(own) - count :] for own in rows), strict=True)
    return [{name: [own[name] for own in step] for name in step[0]} for step in steps]


class Trackers(Tracker):
    """Those of all replicas as one."""

    def __init__(self, each: Sequence[Tracker]) -> None:
        super().__init__()
        self._each = each

    def log(self, row: Mapping[str, Any]) -> None:
        for number, tracker in enumerate(self._each):
            tracker.log(apart(row, number))

    def pictures(self, pictures: Mapping[str, Any], step: int, seen: int) -> None:
        for number, tracker in enumerate(self._each):
            tracker.pictures(apart(pictures, number), step, seen)

    def complete(self, step: int) -> None:
        for tracker in self._each:
            tracker.complete(step)

    def preempted(self) -> None:
        for tracker in self._each:
            tracker.preempted()

    def close(self, failed: bool = False) -> None:
        with ExitStack() as every:  # all end, also where one of them fails
            for tracker in self._each:
                every.callback(tracker.close, failed)


def save_all(checkpoints: Sequence[Checkpoints], recipes: Sequence[Recipe], state: State) -> None:
    """Every replica's part of the state as a checkpoint of its own; the newest step that all have is always kept.

    Raises the first CheckpointError, after the others are saved.
    """
    saved, errors = [], []
    for number, (each, recipe) in enumerate(zip(checkpoints, recipes, strict=True)):
        own = replace(
            state,
            recipe=as_dict(recipe),
            meters=[apart(row, number) for row in state.meters],
            weights={name: weight[number] for name, weight in state.weights.items()},
            moments={name: moment[number] for name, moment in state.moments.items()},
        )
        try:
            each.write(own)
            saved.append(each)
        except CheckpointError as error:
            errors.append(error)
    common = set.intersection(*[each.steps() for each in checkpoints])
    for each in saved:
        each.prune(spare=max(common, default=None))
    if errors:
        raise errors[0]


def newest_common(checkpoints: Sequence[Checkpoints], say: Callable[[str], None]) -> list[Snapshot]:
    """Of every run the snapshot of the newest step that all have whole; none where no run has begun.

    One line says which runs go back to it. Raises CheckpointError where there are checkpoints, but no such step.
    """
    steps = [each.steps() for each in checkpoints]
    for step in sorted(set.intersection(*steps), reverse=True):
        try:
            found = [each.at(step, own) for each, own in zip(checkpoints, steps, strict=True)]
        except DamagedError as error:
            say(f"{error}; trying the step before it that all replicas have")
            continue
        back = [str(each.directory.parent) for each, own in zip(checkpoints, steps, strict=True) if max(own) > step]
        if back:
            say(f"step {step} is the newest that all replicas have whole: back to it go {', '.join(back)}")
        return found
    if not any(steps):
        return []
    behind = min(zip(checkpoints, steps, strict=True), key=lambda pair: max(pair[1], default=0))[0]
    raise CheckpointError(
        f"{behind.directory}: there is no step of which this and all other replicas have a whole checkpoint; train "
        "those alone that lack one, or leave them out"
    )
