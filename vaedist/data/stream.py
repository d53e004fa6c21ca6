"""The endless stream of batches: a thread fetches the next ones while the device works on this one."""

import atexit
import itertools
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vaedist.data.order import Ids, Order
from vaedist.data.store import DeviceStore, Store

DEPTH = 3  # batches fetched ahead: one that is ready, one being copied to the device, one being gathered
QUEUED = 16  # steps that the host may be ahead of a GPU: each has a batch there
PLANNED = 16  # steps whose ids are taken at once: between two gathers the code for it is no longer in the CPU's cache


@dataclass(frozen=True)
class Batch:
    """What one rank needs for one optimizer step, on its device."""

    rows: Tensor  # images, uint8 [streams, accumulate, local, channels, size, size], or ids of those in `store`
    positions: Tensor  # int64 [accumulate, local]: where each image stands in its stream
    store: DeviceStore | None = None  # of a GPU; its ids are int64 [streams, accumulate, local]

    @property
    def images(self) -> Tensor:
        """uint8 [streams, accumulate, local, channels, size, size]"""
        return self.rows if self.store is None else self.store.take(self.rows)


class Stream:
    """One rank's images: a pure function of how many images were consumed before.

    `orders` has one entry for each independent stream of images. `rows(seen)` gives this rank's positions, int64
    [accumulate, local], in the optimizer step that begins when all ranks together have consumed `seen` images of each
    stream; a step consumes `batch` of them.
    """

    def __init__(
        self, store: Store, orders: Sequence[Order], rows: Callable[[int], Ids], batch: int, device: torch.device
    ) -> None:
        self.store, self.orders, self.rows, self.batch, self.device = store, orders, rows, batch, device
        self.waited = 0.0  # seconds for which the consumer had to wait

    def batches(self, start: int) -> Generator[Batch, None, None]:
        """The batches for seen = start, start + batch, ... without end; closing the generator stops the thread.

        A batch belongs to its consumer: its memory is not written again while the consumer holds it. What goes wrong
        in the thread, such as corrupt data, is raised here in the place of the batch it concerns.
        """
        loader = _CudaLoader(self.device) if self.device.type == "cuda" else _Loader(self.device)
        steps = self._steps(start)
        expected: tuple[list[int], list[int]] = [], []

        def load() -> _Loaded:
            nonlocal expected
            positions, ids, shards = next(steps)
            if shards != expected:
                expected = shards
                self.store.expect(*shards)
            return loader.load(self.store, ids, positions)

        ahead = _Ahead(load)
        try:
            while True:
                since = time.perf_counter()
                loaded = [ahead.take()]
                self.waited += time.perf_counter() - since
                yield loader.hand_over(loaded.pop())  # nothing here keeps a batch alive that the consumer let go
        finally:
            ahead.close()

    def _steps(self, start: int) -> Iterator[tuple[Ids, Ids, tuple[list[int], list[int]]]]:
        """Positions [accumulate, local], ids [streams, accumulate, local] and shards of each step."""
        for first in itertools.count(start, PLANNED * self.batch):
            planned = np.stack([self.rows(first + step * self.batch) for step in range(PLANNED)])
            ids = np.stack([order.take(planned) for order in self.orders], axis=1)
            for positions, taken in zip(planned, ids, strict=True):
                yield positions, taken, self._shards(positions)

    def _shards(self, positions: Ids) -> tuple[list[int], list[int]]:
        """The shards that any of the streams needs at these positions, and those needed after them."""
        windows = [order.shards(positions) for order in self.orders]
        now = list(dict.fromkeys(shard for window, _ in windows for shard in window))
        soon = dict.fromkeys(shard for _, window in windows for shard in window)
        return now, [shard for shard in soon if shard not in now]


@dataclass(frozen=True)
class _Loaded:
    batch: Batch
    copied: torch.cuda.Event | None = None


class _Ahead:
    """A thread that calls `load` again and again and is at most `DEPTH` results ahead of `take`."""

    def __init__(self, load: Callable[[], _Loaded]) -> None:
        self._load, self._stopped, self._room = load, False, threading.Semaphore(DEPTH)
        self._ready: queue.SimpleQueue[_Loaded | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # a thread that runs into the end of the interpreter may hang or abort it

    def take(self) -> _Loaded:
        """The next result, or the error that came instead."""
        loaded = self._ready.get()
        self._room.release()
        if isinstance(loaded, BaseException):
            raise loaded
        return loaded

    def close(self) -> None:
        self._stopped = True
        self._room.release()
        self._thread.join()
        atexit.unregister(self.close)

    def _run(self) -> None:
        try:
            while True:
                self._room.acquire()
                if self._stopped:
                    return
                self._ready.put(self._load())
        except BaseException as error:  # whatever ends this thread must end the consumer's wait too
            self._ready.put(error)


class _Loader:
    """Gathers into memory that no consumer holds any more: fresh memory costs as much as the copy into it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.free: list[np.ndarray] = []

    def load(self, store: Store, ids: Ids, positions: Ids) -> _Loaded:
        """Called in the thread; ids [streams, accumulate, local], positions [accumulate, local]."""
        images = self.memory((*ids.shape, *store.shape))
        store.gather(ids.ravel(), out=images.flatten(0, ids.ndim - 1))
        return _Loaded(Batch(images.to(self.device), torch.tensor(positions, device=self.device)))

    def memory(self, shape: tuple[int, ...]) -> Tensor:
        """A uint8 tensor; its memory is used again when neither it nor a view of it is left."""
        array = self.free.pop() if self.free else np.empty(shape, np.uint8)
        lent = array.view()  # what the tensor keeps alive
        weakref.finalize(lent, self.free.append, array).atexit = False
        return torch.from_numpy(lent)

    def hand_over(self, loaded: _Loaded) -> Batch:
        """Called by the consumer."""
        return loaded.batch


class _CudaLoader(_Loader):
    """Copies ids of images on the device, or images by a ring of pinned buffers, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.side = torch.cuda.Stream(device)
        self.ring: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []  # pinned images, positions; their copy's end
        self.given: deque[torch.cuda.Event] = deque()  # where the consumer stood when it took each of the last batches

    def load(self, store: Store, ids: Ids, positions: Ids) -> _Loaded:
        with torch.cuda.stream(self.side):  # also makes its device this thread's, for the pinned memory and the copies
            if isinstance(store, DeviceStore):
                both = torch.from_numpy(np.concatenate([positions[None], ids])).pin_memory()
                both = both.to(self.side.device, non_blocking=True)  # positions first: where memory is aligned
                return _Loaded(Batch(both[1:], both[0], store), self.side.record_event())
            if len(self.ring) < DEPTH:
                pinned = torch.empty((*ids.shape, *store.shape), dtype=torch.uint8, pin_memory=True)
                where = torch.empty(positions.shape, dtype=torch.int64, pin_memory=True)
            else:
                pinned, where, copied = self.ring.pop(0)
                copied.synchronize()
            store.gather(ids.ravel(), out=pinned.flatten(0, ids.ndim - 1))
            where.copy_(torch.from_numpy(positions))
            batch = Batch(pinned.to(self.side.device, non_blocking=True), where.to(self.side.device, non_blocking=True))
            copied = self.side.record_event()
        self.ring.append((pinned, where, copied))
        return _Loaded(batch, copied)

    def hand_over(self, loaded: _Loaded) -> Batch:
        assert loaded.copied is not None
        consumer = torch.cuda.current_stream(self.side.device)
        self.given.append(consumer.record_event())
        if len(self.given) > QUEUED:
            self.given.popleft().synchronize()
        consumer.wait_event(loaded.copied)
        for tensor in (loaded.batch.rows, loaded.batch.positions):
            tensor.record_stream(consumer)  # its memory is the side stream's: free it only after the consumer's work
        return loaded.batch


def shares(count: int, rank: int, world: int, batch: int) -> Iterator[Ids]:
    """The ids 0..count-1 for evaluation: each once over all ranks, and equally many steps on every rank.

    A step is a contiguous run of at most `batch * world` ids, cut evenly in rank order; yields this rank's part,
    int64 [0..batch], empty where there are fewer ids left than ranks.
    """
    for start in range(0, count, batch * world):
        here = min(batch * world, count - start)
        yield np.arange(start + here * rank // world, start + here * (rank + 1) // world)
