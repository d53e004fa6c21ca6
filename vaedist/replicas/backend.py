"""The steps of several runs at once: one Adam on all rows, norms, clipping and moments of each."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from vaedist import branch
from vaedist.backend import Backend, Config, Weights
from vaedist.checkpoint import Snapshot, averaged
from vaedist.config import ConfigError
from vaedist.objectives import Objective
from vaedist.optimizer import Average
from vaedist.replicas.objective import Replicas


class ReplicaBackend(Backend):
    """One process, without DDP: what is said of a `Backend`, of each replica on its own."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if self.world.size > 1 or self._stage is not None:
            raise ConfigError(
                f"train.replicas is for one process without DeepSpeed, not {self.describe()}: launch some replicas "
                "on each GPU, with seeds of their own"
            )

    def prepare(  # type: ignore[override]
        self, objective: Replicas, optimizer: torch.optim.Optimizer, snapshots: Sequence[Snapshot] | None
    ) -> Callable[..., dict[str, Tensor]]:
        """As `Backend.prepare`; the replicas have the snapshots' weights already, not their moments."""
        self._replicas, self._optimizer = objective, optimizer
        self._choose_adam()
        if self._config.ema is not None:
            optimizer.register_step_post_hook(Average(self._config.ema))
        for number, snapshot in enumerate(snapshots or ()):
            self._restore_moments(number, snapshot.moments)

        def model(*batch: Any) -> dict[str, Tensor]:
            with self.autocast():
                return objective(*batch)

        return model

    def accumulate(self, model: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.sum().backward()  # every row's own: no row's loss depends on another's weights
        branch.met()

    def step(self, number: int, measured: bool = False) -> None:
        players = self._replicas.players
        gradients = [grad for player in players if (grad := player.rows.grad) is not None]
        norms = [torch.linalg.vector_norm(gradient, dim=1) for gradient in gradients if measured or self._config.clip]
        if measured:
            for player, norm in zip(players, norms, strict=True):
                self._norms[f"grad_norm_{player.settings[0]['name'].replace(' ', '_')}"] = norm
        if self._config.clip:
            total = torch.linalg.vector_norm(torch.stack(norms), dim=0)
            for gradient in gradients:
                gradient *= (self._config.clip / (total + 1e-6)).clamp(max=1)[:, None]  # as torch clips
        for player, gradient in zip(players, gradients, strict=True):
            for row, own in zip(player.row, gradient, strict=True):
                row.grad = own
        self._move()
        self.forget_gradients()

    def forget_gradients(self) -> None:
        for player in self._replicas.players:
            player.rows.grad = None

    def weights(self) -> Weights:
        return self._replicas.state_dict()

    def observed_each(self) -> Iterator[Objective]:
        """The replicas as evaluations look at them, one after the other."""
        if self._config.ema is None:
            yield from self._replicas.each
            return
        weights = self.weights() | averaged(self.moments())
        for number, objective in enumerate(self._replicas.each):
            copy = deepcopy(objective)
            copy.load_state_dict({name: rows[number] for name, rows in weights.items()})
            yield copy

    def largest(self, weights: Weights) -> Weights:
        return {
            name: weights[name].abs().flatten(1).amax(1) for player in self._replicas.players for name in player.shapes
        }

    def moments(self) -> Weights:
        found: Weights = {}
        for player in self._replicas.players:
            states = [self._optimizer.state[row] for row in player.row]
            for key in states[0]:
                rows = torch.stack([state[key] for state in states])
                parts = player.cut(rows) if rows.ndim > 1 else dict.fromkeys(player.shapes, rows)
                found |= {f"{name}/{key}": part for name, part in parts.items()}
        return found

    def _restore_moments(self, number: int, moments: Weights) -> None:
        for player in self._replicas.players:
            first, row = next(iter(player.shapes)), player.row[number]
            for key in [key.rpartition("/")[2] for key in moments if key.rpartition("/")[0] == first]:
                parts = [moments[f"{name}/{key}"] for name in player.shapes]
                whole = parts[0] if key == "step" else torch.cat([part.flatten() for part in parts]).to(row.dtype)
                self._optimizer.state[row][key] = whole.to(row.device)
