import hashlib
from itertools import chain, combinations

import numpy as np
import pytest

from vaedist.data.order import FullOrder, Order, WindowOrder, permutation, splitmix64
from vaedist.data.stream import shares
from vaedist.noise import fork
from vaedist.world import World


def full(count: int, seed: int) -> Order:
    return FullOrder(count, seed)


def windowed(count: int, seed: int) -> Order:
    """Shards of uneven sizes, in windows of at most three."""
    cuts = range(0, count, 7)
    return WindowOrder([min(7, count - cut) for cut in cuts], window=3, seed=seed)


ORDERS = pytest.mark.parametrize("make", [full, windowed])


def step(world: int, seen: int, batch: int, accumulate: int, order: Order) -> np.ndarray:
    """The ids of one step in order of position, as the ranks of a world take them: [batch]."""
    ranks = [order.take(World(rank, world).positions(seen, batch, accumulate)) for rank in range(world)]
    return np.stack(ranks, axis=1).ravel()


def test_splitmix64_gives_the_published_sequence():
    states = np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    published = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)  # of seed 0
    assert tuple(splitmix64(states).tolist()) == published


def test_the_permutation_keeps_its_bits_for_ever():
    digest = hashlib.sha256(permutation(162_770, 7, 3).astype("<i8").tobytes()).hexdigest()
    assert digest == "741223bb0b7192a28e4f1f0dded71393b5e658ae675439e68cb6c9e1c647c5bf"
    assert fork(0, "a") == 4174393671465045295


def test_forks_differ_by_seed_and_words_and_do_not_run_words_together():
    seeds = [fork(0), fork(1), fork(0, "a"), fork(0, "b"), fork(0, "a", "b"), fork(0, "ab"), fork(0, "a", 1)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


@ORDERS
@pytest.mark.parametrize("count", [1, 2, 97, 1024])
def test_every_id_comes_once_in_every_epoch(make, count):
    order = make(count, seed=1)
    for epoch in range(3):
        ids = order.take(np.arange(epoch * count, (epoch + 1) * count))
        assert np.array_equal(np.sort(ids), np.arange(count))


@ORDERS
@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_world_takes_the_same_batches_and_every_id_once_an_epoch(make, world, accumulate):
    count, batch = 101, 1680  # 101 is prime, so that every batch straddles epochs, at a new place each time
    order = make(count, seed=5)
    batches = [step(world, seen, batch, accumulate, make(count, seed=5)) for seen in range(0, 10 * batch, batch)]
    for number, ids in enumerate(batches):
        assert np.array_equal(ids, order.take(np.arange(number * batch, (number + 1) * batch)))
    epochs = np.concatenate(batches)[: 166 * count].reshape(166, count)
    assert np.array_equal(np.sort(epochs), np.tile(np.arange(count), (166, 1)))


@ORDERS
def test_a_stream_can_begin_at_any_position(make):
    order = make(13, seed=2)
    whole = order.take(np.arange(60))
    for start in range(60):
        assert np.array_equal(make(13, seed=2).take(np.arange(start, 60)), whole[start:])


@ORDERS
def test_positions_may_have_any_shape_and_any_order(make):
    order = make(10, seed=3)
    whole = order.take(np.arange(100))
    positions = np.random.default_rng(0).integers(0, 100, (4, 5, 6))
    assert np.array_equal(order.take(positions), whole[positions])
    assert order.take(np.empty((2, 0), np.int64)).shape == (2, 0)


def test_epochs_and_seeds_are_permuted_independently():
    count = 10_000
    permutations = [
        permutation(count, seed, epoch) for seed in (0, fork(0, "pool"), fork(0, "pairs")) for epoch in (0, 1)
    ]
    for a, b in combinations(permutations, 2):
        assert (a == b).sum() < 10  # 1 is expected of independent permutations
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(count)


def test_what_is_no_order_is_refused():
    with pytest.raises(ValueError, match="at least one image, not 0"):
        FullOrder(0, seed=0)
    with pytest.raises(ValueError, match="at least one image"):
        WindowOrder([], window=2, seed=0)
    for make in (full, windowed):
        with pytest.raises(ValueError, match="start at 0, not -1"):
            make(5, seed=0).take(np.array([3, -1]))


def test_a_windowed_order_keeps_its_bits_for_ever():
    ids = WindowOrder([1000] * 20, window=3, seed=7).take(np.arange(40_000))
    digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    assert digest == "23d46d45a27f3b82186408e94959c3add53d3c7d52c5ead289e1374e40a1f873"


def test_a_window_is_a_permutation_of_whole_shards_and_the_order_tells_which():
    counts, window = [5, 3, 8, 1, 6, 4, 7], 3
    order, total = WindowOrder(counts, window, seed=4), sum(counts)
    shard_of = np.repeat(np.arange(len(counts)), counts)
    seen: list[list[int]] = [[]]
    promised: set[int] = set()
    for position in range(4 * total):
        now, soon = order.shards(np.array([position]))
        if seen[-1] != now:
            assert set(now) - set(seen[-1]) == promised or position == 0
            seen.append(now)
        promised = set(soon)
        assert shard_of[order.take(np.array([position]))[0]] in now
        assert len(now) <= window
    seen = seen[1:]
    assert len(seen) == 4 * 3
    for epoch in range(4):
        assert sorted(chain(*seen[3 * epoch : 3 * epoch + 3])) == list(range(len(counts)))
    assert len({tuple(now) for now in seen}) > 6  # every epoch groups the shards anew


def test_a_batch_over_the_end_of_a_window_names_the_shards_of_both():
    order = WindowOrder([4] * 6, window=2, seed=0)
    first, second = (order.shards(np.array([position]))[0] for position in (7, 8))
    assert order.shards(np.array([7, 8])) == (first + second, order.shards(np.array([16]))[0])


def test_a_window_as_wide_as_the_set_mixes_like_the_full_order():
    counts = [64] * 32
    spread = {}
    for name, order in {
        "full": FullOrder(sum(counts), 0), "all": WindowOrder(counts, 32, 0), "eight": WindowOrder(counts, 8, 0)
    }.items():  # fmt: skip
        shards = order.take(np.arange(sum(counts))).reshape(-1, 256) // 64
        spread[name] = np.mean([len(set(batch.tolist())) for batch in shards])
    assert spread["full"] > 31.5
    assert abs(spread["all"] - spread["full"]) < 0.5
    assert spread["eight"] == 8


@pytest.mark.parametrize("count", [0, 1, 7, 64, 65])
@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize("batch", [1, 4])
def test_shares_hand_out_every_id_once_in_equally_many_steps(count, world, batch):
    ranks = [list(shares(count, rank, world, batch)) for rank in range(world)]
    assert {len(steps) for steps in ranks} == {-(-count // (world * batch))}
    steps = [np.concatenate(step) for step in zip(*ranks, strict=True)]
    assert np.array_equal(np.concatenate([np.empty(0, np.int64), *steps]), np.arange(count))
    assert all(len(share) <= batch for steps in ranks for share in steps)
