"""Processes, devices and precision: the only file that knows accelerate and how a gradient crosses ranks."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from shards.parallel import cores
from vaedist.checkpoint import CheckpointError, Snapshot
from vaedist.config import ConfigError
from vaedist.debug import DivergedError
from vaedist.peers import Peers
from vaedist.world import Vote, World, together

Precision = Literal["fp32", "bf16", "fp16", "fp64"]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE = 1.0  # of the loss in fp16: sums over pixels have large gradients as they are
LAST_SCALE = 2.0**-8  # gradients that overflow even then are those of a run that diverges
MEETING = timedelta(minutes=10)  # for all processes to find each other
START_UP = timedelta(days=1)  # that a node may take to fetch and decode the images while the others wait
STEADY = 2000  # steps without overflow after which the scale is doubled; an overflow halves it


class Backend:
    """One process of a run, on the device that the launcher gave it.

    fp32 computes in float32 proper (no TF32). bf16 keeps weights, moments, posterior and losses in float32 and lets
    autocast choose bfloat16 inside the networks. fp16 does so with float16, whose range is small: the loss is scaled,
    so that few gradients vanish, and a step whose gradients overflow moves nothing (Micikevicius et al. 2018,
    section 3.2). fp64 is for proofs. Raises ConfigError when the launcher was asked for more processes than it started.
    """

    def __init__(self, *, precision: Precision, accumulate: int) -> None:
        # Without rebuilt buckets the order of summation is the same in the first steps of a run and after a resume.
        ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
        found = InitProcessGroupKwargs(init_method="attempt://", timeout=MEETING)
        self._accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),  # else several processes without GPUs would not find each other
            mixed_precision="no",  # whatever the launcher says: see `autocast`
            gradient_accumulation_steps=accumulate,
            kwargs_handlers=[ddp, found],
        )
        self.world = World(self._accelerator.process_index, self._accelerator.num_processes)
        _refuse_missing_processes(self.world)
        self._vote = Vote(self.world)  # here: until all are connected, a signal has to end a process that waits for it
        if self.world.size > 1:
            dist.set_timeout(START_UP)
        self.device = self._accelerator.device
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        self._half = HALF.get(precision)
        # A rank's loss is a mean over its rows, 1 / size of a micro-batch. Scaled by as much less (by a power of two,
        # which is exact), a row's gradient is the same float16 number whatever the number of ranks.
        self._share = 2.0 ** -(self.world.size - 1).bit_length()
        self._scaler = torch.amp.GradScaler(
            self.device.type,
            init_scale=FIRST_SCALE * self._share,
            growth_interval=STEADY,
            enabled=precision == "fp16",
        )
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
    ) -> tuple[Callable[..., dict[str, Tensor]], AcceleratedOptimizer]:
        """The objective as a callable whose backward averages gradients over ranks, and the optimiser that fits it."""
        return self._accelerator.prepare(objective.to(self.dtype), optimizer)

    def accumulate(self, model: Any) -> AbstractContextManager[Any]:
        """Around one micro-batch: gradients cross ranks, and the optimiser moves, at the last of a step only."""
        return self._accelerator.accumulate(model)

    def backward(self, loss: Tensor) -> None:
        with together("the backward pass and its all-reduce of gradients"):
            self._accelerator.backward(self._scaler.scale(loss))

    def step(self, optimizer: AcceleratedOptimizer) -> None:
        """Moves the weights and forgets the gradients; before a step's last micro-batch it does nothing.

        In fp16 it skips a step whose gradients overflow: they were averaged over ranks, so that all see the same. Fused
        Adam does so on the device, and nobody waits to learn of it; accelerate's wrapper would hide that it can.
        """
        if self._accelerator.sync_gradients:
            self._scaler.step(optimizer.optimizer)
            self._scaler.update()
            optimizer.zero_grad()

    def overflows(self, step: int, optimizer: AcceleratedOptimizer) -> dict[str, float]:
        """Of fp16: the loss scale, and how many of the `step` steps were skipped. Raises DivergedError."""
        if not self._scaler.is_enabled():
            return {}
        scale = self.scaling()["loss_scale"]
        if scale < LAST_SCALE:
            raise DivergedError(
                f"step {step}: loss_scale={scale:g}, and the gradients still overflow float16; resume this with "
                "train.precision=bf16 or fp32"
            )
        moved = next(iter(optimizer.state.values()))["step"]  # Adam counts the steps that moved something
        return {"loss_scale": scale, "skipped_steps": step - float(moved)}

    def scaling(self) -> dict[str, float]:
        """What a checkpoint keeps of loss scaling, whatever the number of processes; nothing but for fp16."""
        state = self._scaler.state_dict()
        return {"loss_scale": state["scale"] / self._share, "steady": state["_growth_tracker"]} if state else {}

    def restore_scaling(self, scaling: dict[str, float]) -> None:
        """Goes on with the `scaling` of a checkpoint; one of another precision has none."""
        if scaling:
            ours = {"scale": scaling["loss_scale"] * self._share, "_growth_tracker": scaling["steady"]}
            self._scaler.load_state_dict(self._scaler.state_dict() | ours)

    def copy(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> "Copies":
        """What a checkpoint keeps of weights and optimiser; every rank calls it."""
        return copy(objective, optimizer)

    def restore(self, snapshot: Snapshot, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Puts the weights and moments of a checkpoint in place, whatever processes it was written by.

        Raises CheckpointError when they are those of another model.
        """
        restore(snapshot, objective, optimizer)

    def autocast(self) -> AbstractContextManager[Any]:
        """Around what the networks compute; the same under every engine, which is why the engines do not do it."""
        return torch.autocast(self.device.type, dtype=self._half, enabled=self._half is not None)

    def peers(self) -> Peers:
        """The other processes, as far as they can still be asked when collectives fail."""
        if self.world.size == 1:
            return Peers(0, 1)
        store = dist.distributed_c10d._get_default_store().clone()  # a connection of its own: others may be blocked
        return Peers(self.world.rank, self.world.size, dist.distributed_c10d.PrefixStore("peers", store))

    def vote(self, timeout: float) -> Vote:
        """Of the ranks, in every step; from now on `timeout` seconds are the longest that one waits for another."""
        self._vote.limit(timedelta(seconds=timeout))
        return self._vote

    def close(self) -> None:
        """Ends the process group and its threads: one that lets go of a tensor while the interpreter ends aborts it."""
        self._accelerator.end_training()


Copies = tuple[dict[str, Tensor], dict[str, Tensor]]  # weights and buffers by name, moments by PARAMETER/NAME


def copy(objective: nn.Module, optimizer: torch.optim.Optimizer) -> Copies:
    """`Backend.copy` where every rank holds everything."""
    moments = {
        f"{name}/{key}": value
        for name, parameter in _parameters(objective, optimizer)
        for key, value in optimizer.state[parameter].items()
    }
    return _copies(objective.state_dict()), _copies(moments)


def restore(snapshot: Snapshot, objective: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """`Backend.restore` where every rank holds everything."""
    try:
        objective.load_state_dict(snapshot.weights)
    except RuntimeError as error:
        raise CheckpointError(f"{snapshot.path}: the weights are of another model: {error}") from error
    for name, parameter in _parameters(objective, optimizer):
        keys = [key for key in snapshot.moments if key.rpartition("/")[0] == name]
        optimizer.state[parameter] = {key.rpartition("/")[2]: _like(snapshot.moments[key], parameter) for key in keys}


def _parameters(objective: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield names[id(parameter)], parameter


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """A moment in the parameter's precision; Adam's scalar step count stays float32."""
    return value.to(parameter.device, parameter.dtype if value.ndim else value.dtype)


def _attempt(url: str, **more: Any) -> Iterator[tuple[Any, int, int]]:
    """The rendezvous of the environment, with keys of this attempt's own.

    A launcher that restarts its workers may keep the store, where they would find the addresses of dead ones.
    """
    for store, rank, size in rendezvous(url.replace("attempt:", "env:"), **more):
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        yield dist.distributed_c10d.PrefixStore(f"attempt {attempt}", store), rank, size


register_rendezvous_handler("attempt", _attempt)


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
