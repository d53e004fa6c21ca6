"""Processes, devices and precision: the only file that knows accelerate and how a gradient crosses ranks."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from shards.parallel import cores
from vaedist.config import ConfigError
from vaedist.world import World

Precision = Literal["fp32", "bf16", "fp64"]


class Backend:
    """One process of a run, on the device that the launcher gave it.

    fp32 computes in float32 proper (no TF32). bf16 keeps weights, moments, posterior and losses in float32 and lets
    autocast choose bfloat16 inside the networks. fp64 is for proofs. Raises ConfigError when the launcher was asked for
    more processes than it started.
    """

    def __init__(self, *, precision: Precision, accumulate: int) -> None:
        # Without rebuilt buckets the order of summation is the same in the first steps of a run and after a resume.
        ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # else several processes without GPUs would not find each other
            mixed_precision="no",  # whatever the launcher says: see `autocast`
            gradient_accumulation_steps=accumulate,
            kwargs_handlers=[ddp],
        )
        self.world = World(self._accelerator.process_index, self._accelerator.num_processes)
        _refuse_missing_processes(self.world)
        self.device = self._accelerator.device
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        self._bf16 = precision == "bf16"
        self.threads = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # this process's share
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads)  # launchers say 1
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False

    @property
    def main(self) -> bool:
        return self._accelerator.is_main_process

    def describe(self) -> str:
        processes = "1 process" if self.world.size == 1 else f"{self.world.size} processes"
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{processes} on {name}"

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[Callable[..., dict[str, Tensor]], torch.optim.Optimizer]:
        """The objective as a callable whose backward averages gradients over ranks, and the optimiser that fits it."""
        return self._accelerator.prepare(objective.to(self.dtype), optimizer)

    def accumulate(self, model: Any) -> AbstractContextManager[Any]:
        """Around one micro-batch: gradients cross ranks, and the optimiser moves, at the last of a step only."""
        return self._accelerator.accumulate(model)

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def autocast(self) -> AbstractContextManager[Any]:
        """Around what the networks compute; the same under every engine, which is why the engines do not do it."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._bf16)

    def close(self) -> None:
        """Ends the process group and its threads: one that lets go of a tensor while the interpreter ends aborts it."""
        self._accelerator.end_training()


def _refuse_missing_processes(world: World) -> None:
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != world.size:
        raise ConfigError(f"the launcher started {started} processes, but {world.size} found each other")
    # accelerate's simple launcher, when asked for several processes, prepares a rendezvous and then starts one
    if {
        "ACCELERATE_MIXED_PRECISION",
        "MASTER_ADDR",
        "MASTER_PORT",
    } <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "accelerate was asked for several processes but started one; without GPUs launch them by "
            "`accelerate launch --multi_gpu --num_processes N vaedist/train.py ...` (if one is what you want, unset "
            "MASTER_ADDR and MASTER_PORT)"
        )
