"""Meters: means over steps and micro-batches, and a run that diverges is stopped by name."""

import math

import pytest
import torch

from vaedist.debug import DivergedError
from vaedist.meters import Meters, over_micros
from vaedist.world import World


def add(meters: Meters, *losses: float) -> None:
    meters.add(over_micros([{"loss": torch.tensor(loss), "kl": torch.tensor(2 * loss)} for loss in losses]))


def test_a_line_is_the_mean_over_its_steps_each_the_mean_over_its_micro_batches():
    meters = Meters(World())
    add(meters, 1.0, 3.0)
    add(meters, 4.0, 4.0)
    assert meters.means(2) == {"loss": 3.0, "kl": 6.0}
    meters.clear()
    add(meters, 5.0)
    assert meters.means(3) == {"loss": 5.0, "kl": 10.0}


def test_steps_carried_by_a_checkpoint_count_as_if_nothing_had_happened():
    whole, first = Meters(World()), Meters(World())
    values = [0.1, 0.2, 0.7]
    for value in values:
        add(whole, value)
    for value in values[:2]:
        add(first, value)
    first.reduce(2)
    second = Meters(World(), rows=first.rows)
    add(second, values[2])
    assert second.means(3) == whole.means(3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_term_that_is_not_finite_stops_the_run_and_names_the_step(bad):
    meters = Meters(World())
    for loss in (1.0, bad, 1.0):
        add(meters, loss)
    with pytest.raises(DivergedError, match=f"^step 11: loss={bad}, kl={bad}; .* start a new run with a lower lr"):
        meters.reduce(12)
