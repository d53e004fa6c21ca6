"""The objectives of several runs as one, mapped by torch.vmap over their weights, which lie in rows."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from vaedist.noise import Noise, fork, hashed, signed
from vaedist.objectives import Objective


@dataclass(frozen=True)
class ReplicaNoise(Noise):
    """The noise of the replicas with these seeds; within vmap, where `which` is a scalar, that of one of them."""

    seed: Any  # a tuple of all replicas' seeds
    which: Tensor  # int64 [replicas]

    def fork(self, name: str) -> "ReplicaNoise":
        return replace(self, seed=_forks(self.seed, name))

    def bits(self, purpose: str, columns: int) -> Tensor:
        return hashed(self.positions, _keys(self.seed, purpose, self.which.device)[self.which], columns)


ReplicaMicro = tuple[Tensor, ReplicaNoise]  # images [replicas, streams, local, C, H, W]


@lru_cache(maxsize=1024)  # the same in every step
def _forks(seeds: tuple[int, ...], name: str) -> tuple[int, ...]:
    return tuple(fork(seed, name) for seed in seeds)


@lru_cache(maxsize=1024)
def _keys(seeds: tuple[int, ...], purpose: str, device: torch.device) -> Tensor:
    return torch.tensor([signed(fork(seed, purpose)) for seed in seeds], device=device)


class Player:
    """The weights of one player of all replicas: `rows` [replicas, numbers], of which autograd sees the whole."""

    def __init__(self, groups: Sequence[dict[str, Any]], names: dict[nn.Parameter, str], device: torch.device) -> None:
        """groups: what `param_groups` gives of this player, of every replica; names: of the first one's parameters."""
        self.settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self.shapes = {names[weight]: weight.shape for weight in groups[0]["params"]}
        rows = [torch.cat([weight.detach().flatten() for weight in group["params"]]) for group in groups]
        self.rows = torch.stack(rows).to(device).requires_grad_()
        self.row = self.rows.detach().unbind()  # of each replica, the same memory
        for group, row in zip(groups, self.row, strict=True):
            for weight, part in zip(group["params"], self.cut(row).values(), strict=True):
                weight.data = part

    def cut(self, numbers: Tensor) -> dict[str, Tensor]:
        """[..., numbers] -> the weights by name, [..., *shape]; views."""
        parts = numbers.split([math.prod(shape) for shape in self.shapes.values()], -1)
        return {
            name: part.view(*part.shape[:-1], *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


class Replicas:
    """Several objectives of one kind as one, whose arguments and terms have a row for each.

    `each` remain ordinary objectives: their weights and buffers are views of the rows here. The numbers in which they
    differ, such as gamma, are scalar tensors while an objective is mapped over the rows.
    """

    def __init__(self, each: Sequence[Objective], device: torch.device) -> None:
        self.each, self.streams, self.vae = each, each[0].streams, each[0].vae
        names = {weight: name for name, weight in each[0].named_parameters()}
        groups = zip(*(objective.param_groups() for objective in each), strict=True)
        self.players = [Player(of_all, names, device) for of_all in groups]
        self.buffers = {name: self._stack_buffer(name, device) for name, _ in each[0].named_buffers()}
        self.which = torch.arange(len(each), device=device)
        self._numbers = differing([vars(objective) for objective in each], self.players[0].rows)
        self._within = _Within(each[0])

    def __call__(self, images: Tensor, noise: ReplicaNoise, step: Tensor, surveyed: Any) -> dict[str, Tensor]:
        return self.map(lambda one, noise, *own: one(own[0], noise, step, own[1]), noise, images, surveyed)

    def survey(self, micros: Sequence[ReplicaMicro], step: Tensor) -> Sequence[Any]:
        ((images, noise),) = micros
        if not self._has("survey"):  # with one micro-batch
            return [None]
        return self.map(lambda one, noise, images: one.survey([(images, noise)], step), noise, images)

    def latents(self, micros: Sequence[ReplicaMicro]) -> dict[str, Tensor]:
        ((images, noise),) = micros
        return self.map(lambda one, noise, images: one.latents([(images, noise)]), noise, images)

    def after_step(self, terms: dict[str, Tensor]) -> None:
        if self._has("after_step"):
            self.map(lambda one, _, terms: (one.after_step(terms), terms)[1], None, terms)  # vmap must see a tensor

    def state_dict(self) -> dict[str, Tensor]:
        """All weights and buffers by name, [replicas, ...], in the order of one replica's."""
        found = self._weights(lambda player: player.rows.detach()) | self.buffers
        return {name: found[name] for name in self.each[0].state_dict()}

    def param_groups(self, optimizers: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """For every player the rows with the same settings are a group; optimizers: what each replica's recipe says."""
        for player in self.players:
            alike: dict[tuple[Any, ...], list[Tensor]] = {}
            for row, recipe, own in zip(player.row, optimizers, player.settings, strict=True):
                alike.setdefault(tuple((recipe | own).items()), []).append(row)
            for settings, rows in alike.items():
                yield {**dict(settings), "params": rows}

    def map(self, work: Callable[..., Any], noise: ReplicaNoise | None, *rows: Any) -> Any:
        """`work(objective, its noise, *its row of rows)` of every replica; rows: tensors, or containers of them."""

        def one(weights: dict[str, Tensor], numbers: dict[str, Any], which: Tensor, *own: Any) -> Any:
            own_noise = noise and replace(noise, which=which)
            with changed(self.each[0], numbers):
                return functional_call(self._within, weights, (lambda objective: work(objective, own_noise, *own),))

        tensors = self._weights(lambda player: player.rows) | self.buffers
        arguments = {f"objective.{name}": tensor for name, tensor in tensors.items()}, self._numbers, self.which, *rows
        dimensions = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, arguments)
        return torch.vmap(one, dimensions)(*arguments)

    def _has(self, method: str) -> bool:
        """Whether the objectives have a method of their own, beyond what all have."""
        return getattr(type(self.each[0]), method) is not getattr(Objective, method)

    def _weights(self, rows: Callable[[Player], Tensor]) -> dict[str, Tensor]:
        return {name: weight for player in self.players for name, weight in player.cut(rows(player)).items()}

    def _stack_buffer(self, name: str, device: torch.device) -> Tensor:
        module, _, leaf = name.rpartition(".")
        rows = torch.stack([objective.get_buffer(name) for objective in self.each]).to(device)
        for objective, row in zip(self.each, rows, strict=True):
            setattr(objective.get_submodule(module), leaf, row)
        return rows


class _Within(nn.Module):
    """Whatever work on an objective, as the forward that `functional_call` knows."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, work: Callable[[Objective], Any]) -> Any:
        return work(self.objective)


def differing(settings: Sequence[dict[str, Any]], like: Tensor) -> dict[str, Any]:
    """The settings that are not the same in all of these: numbers as tensors, dataclasses with such tensors in them."""
    found: dict[str, Any] = {}
    for name, first in settings[0].items():
        values = [setting[name] for setting in settings]
        if name.startswith("_") or all(value is first or value == first for value in values):
            continue
        if is_dataclass(first):
            own = [{field.name: getattr(value, field.name) for field in fields(value)} for value in values]
            found[name] = differing(own, like)
        else:
            found[name] = torch.tensor(values, dtype=like.dtype, device=like.device)
    return found


@contextmanager
def changed(objective: Objective, numbers: dict[str, Any]) -> Iterator[None]:
    """While it is entered, the objective's attributes are these; what is a dict of them is about a dataclass."""
    before = {name: getattr(objective, name) for name in numbers}
    for name, value in numbers.items():
        setattr(objective, name, replaced(before[name], value) if isinstance(value, dict) else value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(objective, name, value)


def replaced(section: Any, numbers: dict[str, Any]) -> Any:
    """A dataclass with these fields, nested ones by dicts of theirs."""
    own = {key: replaced(getattr(section, key), v) if isinstance(v, dict) else v for key, v in numbers.items()}
    return replace(section, **own)
