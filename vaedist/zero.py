"""DeepSpeed's ZeRO: the same steps with optimiser state, gradients and weights divided among the ranks.

A ZeRO optimiser moves flat tensors, a rank's share of many weights each; `Shares` knows which weight lies where, so
that checkpoints can say nothing of it.
"""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from vaedist.config import ConfigError
from vaedist.world import World

STEP = "step"  # among the moments of a weight how often Adam has moved it, a scalar
Stage = Literal[0, 1, 2, 3]
Device = Literal["none", "cpu"]


class Plugin(DeepSpeedPlugin):
    def set_deepspeed_weakref(self) -> None:
        """Accelerate would import transformers here, to build their models divided from the start."""


def plugin(
    stage: int | None,
    *,
    rows: int,
    accumulate: int,
    clip: float,
    offload_optimizer: Device | None,
    offload_param: Device | None,
) -> Plugin:
    """What makes accelerate start DeepSpeed, with the stage and offloading of the launcher's config file where they are
    None. rows: of a micro-batch on one rank.
    """
    made = Plugin(
        hf_ds_config="none",
        zero_stage=stage,
        gradient_accumulation_steps=accumulate,
        offload_optimizer_device=offload_optimizer,
        offload_param_device=offload_param,
        zero3_init_flag=False,
    )
    _refuse_nonsense(made)
    if "WORLD_SIZE" not in os.environ:  # one process, which needs a process group nevertheless
        here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(here, MASTER_PORT=str(_free_port()))
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # what it would find by itself, and say
        import deepspeed.ops

        # a faster gather on the CPUs of one machine, for which it would run a compiler for minutes
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    made.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_clipping": clip,  # said even if 0: left out, it is 1
        "zero_force_ds_cpu_optimizer": False,  # torch's own Adam wherever it runs
    }
    # A weight is whole only while a network uses it, and not fetched ahead, in an order that `survey` would upset
    made.deepspeed_config["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    return made


def _refuse_nonsense(made: Plugin) -> None:
    """Raises ConfigError for what DeepSpeed would leave out without a word, whoever has said it."""
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        raise ConfigError(
            "the launcher's config file names a deepspeed_config_file: say zero_stage and offloading in its place"
        )
    if os.environ.get("ACCELERATE_GRADIENT_CLIPPING"):
        raise ConfigError("the launcher's config file has gradient_clipping: say train.clip instead")
    if "nvme" in (made.offload_optimizer_device, made.offload_param_device):
        raise ConfigError(
            "the launcher's config file offloads to nvme, which no checkpoint is read from: let it say cpu"
        )
    if made.offload_optimizer_device != "none" and made.zero_stage == 0:
        raise ConfigError("train.offload_optimizer needs train.zero_stage=1, 2 or 3")
    if made.offload_param_device != "none" and made.zero_stage != 3:
        raise ConfigError("train.offload_param needs train.zero_stage=3")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class LossScaler:
    """torch's rule of loss scaling, and state_dict, in the place where DeepSpeed has its own.

    DeepSpeed asks it to update before it divides the gradients of the same step by `cur_scale`, which therefore grows
    with the next loss only.
    """

    dynamic = True

    def __init__(self, scale: float, growth_interval: int) -> None:
        self.scale, self.steady, self.growth_interval = scale, 0, growth_interval
        self.cur_scale = scale

    def scale_loss(self, loss: Tensor) -> Tensor:
        self.cur_scale = self.scale
        return loss * self.scale

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "_growth_tracker": self.steady}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scale, self.steady = state["scale"], state["_growth_tracker"]

    def update_scale(self, overflow: bool) -> None:
        self.steady = 0 if overflow else self.steady + 1
        if overflow:
            self.scale /= 2
        elif self.steady == self.growth_interval:
            self.scale, self.steady = 2 * self.scale, 0


@dataclass(frozen=True)
class Share:
    """The numbers [start, start + count) of a weight, at [at, at + count) of a flat tensor."""

    name: str
    flat: int
    at: int
    start: int
    count: int


class Shares:
    """Where this rank's share of every weight lies in the flat tensors of a ZeRO optimiser (stage 1, 2 or 3).

    Weights and moments of all ranks together are a sum over ranks: each adds its shares to zeros.
    """

    def __init__(self, zero: Any, objective: nn.Module, world: World, device: torch.device) -> None:
        self.zero, self._world, self._device = zero, world, device
        names = {id(parameter): name for name, parameter in objective.named_parameters()}
        three = hasattr(zero, "fp32_partitioned_groups_flat")
        self.flats: list[Tensor] = zero.fp32_partitioned_groups_flat if three else zero.single_partition_of_fp32_groups
        groups = zero.fp16_groups if three else zero.bit16_groups
        self._members = [[names[id(parameter)] for parameter in group] for group in groups]
        self.shapes = {
            names[id(parameter)]: tuple(parameter.ds_shape if three else parameter.shape)
            for group in groups
            for parameter in group
        }
        found = _divided_weights if three else _divided_groups
        self._shares = list(found(zero, groups, names, world))

    def gather(self, key: str | None = None) -> dict[str, Tensor]:
        """The weights of all ranks, or what the optimiser keeps under `key`, by name; every rank must call it."""
        whole = {name: torch.zeros(prod(shape), device=self._device) for name, shape in self.shapes.items()}
        for share in self._shares:
            flat = self.flats[share.flat]
            source = flat.detach() if key is None else self.zero.optimizer.state[flat][key]
            whole[share.name][share.start : share.start + share.count] = source[share.at : share.at + share.count]
        # one sum for all: adding zeros changes no bit
        summed = self._world.sum(torch.cat(list(whole.values()))).split([len(part) for part in whole.values()])
        return {name: part.view(self.shapes[name]) for name, part in zip(whole, summed, strict=True)}

    def moments(self) -> dict[str, Tensor]:
        """What the optimiser keeps, by PARAMETER/NAME; every rank must call it."""
        state = self.zero.optimizer.state
        keys = state[self.flats[0]].keys() - {STEP}
        found = {f"{name}/{key}": value for key in sorted(keys) for name, value in self.gather(key).items()}
        for flat, members in zip(self.flats, self._members, strict=True):
            found |= {f"{name}/{STEP}": state[flat][STEP] for name in members if STEP in state[flat]}
        return found

    def put(self, moments: Mapping[str, Tensor]) -> None:
        """Gives the optimiser this rank's share of what `moments` gave, on whatever ranks and engine."""
        state = self.zero.optimizer.state
        keys = {key.rpartition("/")[2] for key in moments}
        for flat, members in zip(self.flats, self._members, strict=True):
            for key in keys:
                step = moments[f"{members[0]}/{STEP}"]  # the same for all members: they move together
                state[flat][key] = step.to(flat.device, copy=True) if key == STEP else torch.zeros_like(flat.detach())
        for share in self._shares:
            for key in keys - {STEP}:
                value = moments[f"{share.name}/{key}"].flatten()
                own = state[self.flats[share.flat]][key]
                own[share.at : share.at + share.count] = value[share.start : share.start + share.count]


def _divided_groups(zero: Any, groups: list[list[Any]], names: dict[int, str], world: World) -> Iterator[Share]:
    """Stages 1 and 2: the weights of a group lie one after the other in a tensor, of which each rank has a part."""
    for number, group in enumerate(groups):
        whole, own = zero.bit16_groups_flat[number], zero.parallel_partitioned_bit16_groups[number][world.rank]
        first = own.storage_offset() - whole.storage_offset()
        for parameter in group:
            begins = parameter.data.storage_offset() - whole.storage_offset() - first
            start, end = max(0, -begins), min(parameter.numel(), own.numel() - begins)
            if start < end:
                yield Share(names[id(parameter)], number, begins + start, start, end - start)


def _divided_weights(zero: Any, groups: list[list[Any]], names: dict[int, str], world: World) -> Iterator[Share]:
    """Stage 3: of every weight each rank has a part, and these lie one after the other."""
    for number, group in enumerate(groups):
        at = 0
        for parameter in group:
            size = parameter.partition_numel()
            start = world.rank * size
            count = min(size, parameter.ds_numel - start)
            if count > 0:
                yield Share(names[id(parameter)], number, at, start, count)
            at += size
