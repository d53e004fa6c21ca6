import itertools
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from tiny_set import pack_tiny, spoil

from shards.manifest import ShardError
from shards.reading.library import Library
from shards.reading.reader import Reader
from vaedist.data.order import FullOrder, WindowOrder
from vaedist.data.pixels import flip, to_float
from vaedist.data.store import TarStore, open_store
from vaedist.data.stream import DEPTH, Stream
from vaedist.noise import fork
from vaedist.world import World

CPU = torch.device("cpu")
COUNT, BATCH = 23, 24


class Numbered:
    """A store whose every pixel is the image's id."""

    count, shape, device, digest = COUNT, (3, 2, 2), CPU, None

    def gather(self, ids, out=None):
        images = torch.from_numpy(ids).to(torch.uint8)[:, None, None, None].expand(-1, *self.shape)
        return images.clone() if out is None else out.copy_(images)


class Faulty(Numbered):
    def gather(self, ids, out=None):
        if 7 in ids:
            raise ShardError("image 7 is corrupt")
        return super().gather(ids, out)


def stream(rank=0, world=1, accumulate=1, store=None, names=("images",), device=CPU) -> Stream:
    orders = [FullOrder(COUNT, fork(0, name)) for name in names]
    return Stream(
        store or Numbered(), orders, lambda seen: World(rank, world).positions(seen, BATCH, accumulate), BATCH, device
    )


def take(stream: Stream, steps: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [steps, streams, accumulate, local] and positions [steps, accumulate, local]"""
    batches = stream.batches(start)
    taken = list(itertools.islice(batches, steps))
    batches.close()
    images = torch.stack([batch.images for batch in taken])
    assert torch.equal(images, images[..., :1, :1, :1].expand_as(images))
    return images[..., 0, 0, 0].long(), torch.stack([batch.positions for batch in taken])


def prefetch_threads() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_a_batch_holds_the_images_at_its_positions():
    ids, positions = take(stream(accumulate=3), steps=8)
    assert ids.shape == (8, 1, 3, 8)
    assert torch.equal(positions.flatten(), torch.arange(8 * BATCH))
    assert np.array_equal(ids.flatten(), FullOrder(COUNT, fork(0, "images")).take(np.arange(8 * BATCH)))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_ranks_of_any_world_share_the_batches_of_one_process(world, accumulate):
    whole, _ = take(stream(), steps=5)
    ranks = [take(stream(rank, world, accumulate), steps=5)[0] for rank in range(world)]
    assert torch.equal(torch.stack(ranks, dim=3).flatten(1), whole.flatten(1))


def test_a_stream_continues_from_every_step_including_the_ends_of_epochs():
    ids, positions = take(stream(), steps=2 * COUNT)  # BATCH and COUNT have no common factor: two full rounds
    for step in range(2 * COUNT - 1):
        later_ids, later_positions = take(stream(), steps=1, start=step * BATCH)
        assert torch.equal(later_ids, ids[step : step + 1])
        assert torch.equal(later_positions, positions[step : step + 1])


def test_streams_side_by_side_are_independent_and_complete():
    ids, _ = take(stream(names=("images", "pool", "pairs")), steps=COUNT)
    ids = ids.transpose(0, 1).reshape(3, BATCH, COUNT)  # [stream, epoch, position]
    assert torch.equal(ids.sort().values, torch.arange(COUNT).expand(3, BATCH, COUNT))
    alone, _ = take(stream(names=("pool",)), steps=COUNT)
    assert torch.equal(alone.flatten(), ids[1].flatten())
    for a, b in itertools.combinations(ids, 2):
        assert (a == b).float().mean() < 0.15  # 1/23 is expected


def test_a_batch_stays_as_it_is_while_its_consumer_holds_it():
    batches = stream().batches(0)
    held = [next(batches) for _ in range(3 * DEPTH)]
    copies = [batch.images.clone() for batch in held]
    for _ in range(3 * DEPTH):
        next(batches)
    batches.close()
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(held, copies, strict=True))


def test_memory_that_no_consumer_holds_is_used_again():
    batches = stream().batches(0)
    kept = next(batches).images[0, 0, 3:5]  # a view is enough to keep the whole
    copy, places = kept.clone(), set()
    for _ in range(20 * DEPTH):
        places.add(next(batches).images.data_ptr())
    batches.close()
    assert len(places) <= DEPTH + 2
    assert torch.equal(kept, copy)


def test_corrupt_data_is_raised_at_the_batch_it_belongs_to():
    ids = FullOrder(COUNT, fork(0, "images")).take(np.arange(COUNT))
    bad = int(np.flatnonzero(ids == 7)[0]) // BATCH
    for start in range(bad + 1):
        batches = stream(store=Faulty()).batches(start * BATCH)
        for _ in range(start, bad):
            next(batches)
        with pytest.raises(ShardError, match="image 7 is corrupt"):
            next(batches)
        assert prefetch_threads() == 0


def test_a_flipped_bit_in_a_tar_reaches_the_consumer_by_name(tmp_path):
    manifest = pack_tiny(tmp_path / "tiny")
    place = spoil(manifest, 11)
    library = Library(str(manifest.directory), tmp_path / "cache")
    with pytest.raises(ShardError) as error:
        take(stream(store=TarStore(Reader(library, "train", size=8, crop=28, threads=2))), steps=2)
    assert str(error.value).startswith(place)


def test_closing_stops_the_thread_even_when_it_waits_for_room():
    batches = stream().batches(0)
    next(batches)
    assert prefetch_threads() == 1
    batches.close()
    assert prefetch_threads() == 0


def test_dropping_the_generator_stops_the_thread():
    batches = stream().batches(0)
    next(batches)
    del batches
    assert prefetch_threads() == 0


def test_the_thread_is_at_most_the_depth_ahead():
    gathered: list[list[int]] = []
    enough = threading.Event()

    class Recorded(Numbered):
        def gather(self, ids, out=None):
            gathered.append(ids.tolist())
            if len(gathered) == DEPTH + 1:
                enough.set()
            return super().gather(ids, out)

    batches = stream(store=Recorded()).batches(0)
    next(batches)
    assert enough.wait(60)
    batches.close()
    order = FullOrder(COUNT, fork(0, "images"))
    assert gathered == [order.take(np.arange(seen, seen + BATCH)).tolist() for seen in (0, 24, 48, 72)]


def test_a_store_is_told_once_which_shards_come_next_and_before_they_are_needed():
    counts = [4, 6, 5, 3, 5]  # COUNT images

    class Windowed(Numbered):
        def __init__(self):
            self.told: list[tuple[list[int], list[int]]] = []

        def expect(self, now, soon):
            self.told.append((now, soon))

        def gather(self, ids, out=None):
            shards = np.searchsorted(np.cumsum(counts), ids, side="right")
            assert set(shards.tolist()) <= set(self.told[-1][0])
            return super().gather(ids, out)

    store, orders = Windowed(), [WindowOrder(counts, 2, seed) for seed in (1, 2)]
    batches = Stream(store, orders, lambda seen: np.arange(seen, seen + 2)[None], 2, CPU).batches(0)
    for _ in range(COUNT):  # two epochs
        next(batches)
    batches.close()
    assert all(told != later for told, later in itertools.pairwise(store.told))
    assert all(not set(now) & set(soon) for now, soon in store.told)
    assert len(store.told) < 2 * COUNT
    first, after = orders[0].shards(np.arange(2))
    assert store.told[0][0][: len(first)] == first
    assert set(after) <= set(store.told[0][0] + store.told[0][1])


def test_waiting_is_measured():
    began = stream()
    assert began.waited == 0
    take(began, steps=1)
    assert began.waited > 0


def test_a_program_may_end_without_closing_its_stream():
    script = """
import numpy as np, torch
from vaedist.data.order import FullOrder, WindowOrder
from vaedist.data.stream import Stream
class Store:
    count, shape = 5, (3, 2, 2)
    def gather(self, ids, out=None):
        return torch.zeros(len(ids), 3, 2, 2, dtype=torch.uint8)
rows = lambda seen: np.arange(seen, seen + 4)[None]
batches = Stream(Store(), [FullOrder(5, 0)], rows, 4, torch.device("cpu")).batches(0)
next(batches)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.gpu
def test_a_cuda_device_receives_the_same_batches_through_the_pinned_ring():
    expected_ids, expected_positions = take(stream(names=("images", "pool")), steps=50)
    ids, positions = take(stream(names=("images", "pool"), device=torch.device("cuda")), steps=50)
    assert torch.equal(ids.cpu(), expected_ids)
    assert torch.equal(positions.cpu(), expected_positions)


@pytest.mark.gpu
def test_images_kept_on_a_cuda_device_come_in_the_same_batches(tmp_path):
    library = Library(str(pack_tiny(tmp_path / "tiny").directory), tmp_path)
    reader = Reader(library, "train", size=8, crop=28, threads=2)
    images = []
    for kind, device in (("tar", CPU), ("device", torch.device("cuda"))):
        store = open_store(reader, kind=kind, cache=tmp_path, device=device, announce=print)
        batches = stream(store=store, names=("images", "pool"), device=device).batches(0)
        images.append(torch.stack([next(batches).images.cpu() for _ in range(50)]))
        batches.close()
    assert torch.equal(*images)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0)])
def test_bytes_are_spread_evenly_over_the_range_of_the_pixels(low, high):
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    for dtype in (torch.float32, torch.float64):
        numbers = to_float(images, dtype, (low, high)).flatten()
        assert (numbers[0].item(), numbers[-1].item()) == (low, high)
        torch.testing.assert_close(numbers, torch.linspace(low, high, 256, dtype=dtype))


def test_flipping_mirrors_the_chosen_images_only():
    images = torch.rand(2, 3, 3, 4, 4)
    bits = torch.tensor([[True, False, True], [False, False, True]])
    flipped = flip(images, bits)
    for index in itertools.product(range(2), range(3)):
        assert torch.equal(flipped[index], images[index].flip(-1) if bits[index] else images[index])
