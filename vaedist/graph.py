"""On a GPU the usual step is captured once, as a CUDA graph, and replayed: the same kernels without their launches.

The networks are small: a step is hundreds of kernels of microseconds, each of which a host takes as long to launch.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vaedist.backend import Backend
from vaedist.data.stream import Batch
from vaedist.world import none_awaited

WARM = 3  # steps in which memory is found, kernels are chosen, the optimiser makes its moments and NCCL connects
Take = Callable[[Batch, Tensor, bool], tuple[dict[str, Tensor], dict[str, Tensor]]]


class Replayed:
    """The steps that `take(batch, done, measured)` takes, which gives their terms and their latents.

    The first ones, and those that are measured, are taken as they are written, all others by replays. The terms of a
    step are its caller's until the next one.
    """

    def __init__(self, take: Take, backend: Backend, say: Callable[[str], None]) -> None:
        self._take, self._backend, self._say = take, backend, say
        self._warm = WARM
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captures = backend.captures
        if self._captures and backend.uncapturable:
            self._give_up(backend.uncapturable)

    def __call__(self, batch: Batch, done: int, measured: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The next step, after `done` others."""
        if self._captures and not self._warm and not measured and self._graph is None:
            self._capture(batch, done)
        if self._graph is None or measured:
            self._warm = max(0, self._warm - 1)
            return self._take(batch, self._count(done), measured)
        self._batch.rows.copy_(batch.rows)
        self._batch.positions.copy_(batch.positions)
        self._done.fill_(done)
        self._graph.replay()
        return self._terms, {}

    def _count(self, done: int) -> Tensor:
        return torch.full((), done, dtype=self._backend.dtype, device=self._backend.device)

    def _capture(self, batch: Batch, done: int) -> None:
        """Nothing is computed, so nothing has happened where it fails. Every rank calls it, and all succeed or none."""
        self._batch = replace(batch, rows=batch.rows.clone(), positions=batch.positions.clone())
        self._done, graph, why = self._count(done), torch.cuda.CUDAGraph(), ""
        beside = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        try:
            with (
                self._backend.capturing(),
                torch.cuda.stream(torch.cuda.current_stream()),  # where a failure leads back to
                # of this thread alone: another one copies the next batches meanwhile, and NCCL has threads too
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
                self._backend.branching(),
            ):
                self._terms, _ = self._take(self._batch, self._done, False)
            if torch.cuda.mem_get_info()[0] < beside:
                why = "there is no memory for both, and some steps and evaluations are not in the graph"
        except RuntimeError as error:
            none_awaited()
            # the end of a capture that has failed raises an error of its own
            why = str(error.__context__ or error).partition("\n")[0]
        reasons = [other for other in self._backend.world.everyone(why) if other]
        if reasons:
            self._give_up(reasons[0])
        else:
            self._graph = graph

    def _give_up(self, why: str) -> None:
        self._captures, self._terms = False, {}
        self._say(f"steps are launched kernel by kernel, not as one CUDA graph: {why}")
