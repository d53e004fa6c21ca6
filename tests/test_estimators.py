"""What benchmarks/estimators.py tells of the estimates, in small samples, and of the memory of a rank's share."""

import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import estimators
import pytest
from estimators import ESTIMATES, IMAGES, LATENT, estimate, limit, summary

pytestmark = pytest.mark.slow  # a minute of samples; tests/test_aggregate.py has the estimates in closed form
TC, SLOPE, MI, DWKL = range(4)
Number = tuple[float, float]  # and its standard error


@pytest.fixture(scope="module")
def cells() -> dict[tuple[str, int], list[Number]]:
    turns = {8: 400, 64: 100}
    return {
        (name, batch): summary([estimate(weights, batch, turn) for turn in range(count)])
        for name, weights in ESTIMATES.items()
        for batch, count in turns.items()
    }


def truth(term: int, more: float = 0) -> Number:
    return limit()[term] + more, 0.01  # the set is within this of its limit


def descending(*numbers: Number) -> bool:
    """Each by four standard errors at least."""
    return all(a - b > 4 * math.hypot(da, db) for (a, da), (b, db) in pairwise(numbers))


def test_mws_tells_a_tc_too_high_by_a_log_of_the_set_for_all_latents_but_one_and_pulls_less_in_small_batches(cells):
    small, large = cells["MWS", 8], cells["MWS", 64]
    assert descending(small[TC], large[TC], truth(TC, (LATENT - 1) * math.log(IMAGES)))
    assert descending(truth(SLOPE), large[SLOPE], small[SLOPE])
    assert descending(large[MI], small[MI], truth(MI))
    assert descending(truth(DWKL), small[DWKL], large[DWKL])


@pytest.mark.parametrize("name", ["MSS", "averaged"])
def test_mss_has_the_opposite_bias_in_tc_and_its_slope_and_nears_the_truth_with_the_batch(name, cells):
    small, large = cells[name, 8], cells[name, 64]
    assert descending(truth(TC), large[TC], small[TC])
    assert descending(large[SLOPE], truth(SLOPE))
    assert descending(small[MI], large[MI], truth(MI))
    assert descending(truth(DWKL), large[DWKL], small[DWKL])


def test_the_exact_terms_of_the_set_are_near_its_limit():
    found = estimators.exact(0, block=100)
    assert all(
        abs(value - number) < bound for value, number, bound in zip(found, limit(), (0.3, 0.4, 0.3, 0.1), strict=True)
    )


def test_the_memory_of_a_rank_does_not_grow_with_its_rows():
    """In a process of its own: 32 rows against 4,096, then 256, then 256 at once."""
    program = """
import estimators
from vaedist import aggregate
for rows, chunk in ((2, 2**18), (32, 2**18), (256, 2**18), (256, 2**30)):
    aggregate.CHUNK = chunk
    estimators.share(rows, 4096)
    print(estimators.peak())
"""
    where = Path(estimators.__file__).parent
    done = subprocess.run([sys.executable, "-c", program], cwd=where, capture_output=True, text=True, check=True)
    _, few, many, at_once = map(int, done.stdout.split())
    one_tensor = 4 * 256 * 4096 * LATENT
    assert many - few < one_tensor / 4
    assert at_once - many > 3 * one_tensor
