"""Processes, devices, engines and precision: how a gradient crosses ranks. It and `zero` alone know accelerate."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from shards.parallel import cores
from vaedist import adam, branch, zero
from vaedist.checkpoint import CheckpointError, Snapshot, averaged
from vaedist.config import ConfigError, bounded
from vaedist.debug import DivergedError, read
from vaedist.gradients import Gradients
from vaedist.halves import Autocast
from vaedist.heap import keep_freed_memory
from vaedist.optimizer import Average
from vaedist.peers import Peers
from vaedist.world import Vote, World, set_timeout, together

Precision = Literal["fp32", "bf16", "fp16", "fp64"]
Engine = Literal["auto", "ddp", "deepspeed"]
Weights = dict[str, Tensor]
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE = 1.0  # of the loss in fp16: sums over pixels have large gradients as they are
LAST_SCALE = 2.0**-8  # gradients that overflow even then are those of a run that diverges
MEETING = timedelta(minutes=10)  # for all processes to find each other
START_UP = timedelta(days=1)  # that a node may take to fetch and decode the images while the others wait
STEADY = 2000  # steps without overflow after which the scale is doubled; an overflow halves it


@dataclass(frozen=True, kw_only=True)
class Config:
    """How a run takes its steps. Batch sizes are those of all ranks together."""

    steps: int = bounded(1_000_000, at_least=1, at_most=10**10)
    batch: int = bounded(64, at_least=1, at_most=2**24)  # images of an optimiser step
    accumulate: int = bounded(1, at_least=1)  # micro-batches of an optimiser step
    replicas: int = bounded(1, at_least=1)  # runs at once in this process, see `recipe.load_all`
    timeout: float = bounded(600.0, above=0, at_most=10**8)  # seconds that one waits for another rank in a step
    precision: Precision = "fp32"
    capture: bool = True  # a step as one CUDA graph
    tf32: bool = False  # products of float32 from inputs of 11 bits, in the tensor cores of a GPU
    compile: bool = False  # the objective, by torch.compile
    clip: float = bounded(0.0, at_least=0)  # largest norm of all gradients together; 0: any
    ema: float | None = bounded(None, at_least=0, below=1)  # decay of the averaged weights that evaluations look at
    engine: Engine = "auto"  # what the launcher's config file says, else ddp
    zero_stage: zero.Stage | None = None  # of deepspeed; null: what the launcher's config file says, else 2
    offload_optimizer: zero.Device | None = None  # its state, in stages 1 to 3; null: likewise, else none
    offload_param: zero.Device | None = None  # the weights, in stage 3; null: likewise, else none

    def __post_init__(self) -> None:
        if self.tf32 and self.precision == "fp64":
            raise ValueError("tf32=true is about float32, of which precision=fp64 has none")
        if self.engine != "deepspeed":
            for name in ("zero_stage", "offload_optimizer", "offload_param"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} belongs to engine=deepspeed")
        if self.replicas > 1:
            for name, value, instead in (
                ("precision", "fp16", "bf16 or fp32"), ("engine", "deepspeed", "ddp"), ("compile", True, "false")
            ):  # fmt: skip
                if getattr(self, name) == value:
                    raise ValueError(f"replicas={self.replicas} goes with {name}={instead}")
            if self.accumulate > 1:
                raise ValueError(f"replicas={self.replicas} goes with accumulate=1: say fewer replicas")

    def local(self, world_size: int) -> int:
        """Rows of a micro-batch on one rank. Raises ConfigError when the batch does not divide."""
        rows, rest = divmod(self.batch, self.accumulate * world_size)
        if rest or not rows:
            sizes = [n for n in range(1, self.batch + 1) if self.batch % (self.accumulate * n) == 0]
            fitting = (
                f"processes in {{{', '.join(map(str, sizes))}}}" if sizes else "a train.accumulate that divides it"
            )
            raise ConfigError(
                f"train.batch={self.batch} does not divide into train.accumulate={self.accumulate} micro-batches "
                f"on {world_size} processes: use {fitting}"
            )
        return rows


class Backend:
    """One process of a run, on the device that the launcher gave it.

    fp32 computes in float32 proper, with `tf32` from inputs rounded to 11 bits where the device has that. bf16 keeps
    weights, moments, posterior and losses in float32 and lets autocast choose bfloat16 inside the networks. fp16 does
    so with float16, whose range is small: the loss is scaled, so that few gradients vanish, and a step whose gradients
    overflow moves nothing (Micikevicius et al. 2018, section 3.2). fp64 is for proofs. All of it means the same under
    DDP and DeepSpeed.
    """

    def __init__(self, config: Config) -> None:
        """Raises ConfigError when the launcher was asked for other processes, or another engine, than there are."""
        _refuse_one_of_several()
        asked = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        if asked and config.engine == "ddp":
            raise ConfigError(
                "train.engine=ddp, but the launcher's config file asks for DeepSpeed: give up one of them"
            )
        deepspeed = asked or config.engine == "deepspeed"
        if deepspeed and parse_flag_from_env("ACCELERATE_USE_CPU"):
            raise ConfigError(
                "train.engine=deepspeed, but the launcher was told to use the CPU, where accelerate starts no "
                "DeepSpeed: leave out --cpu, or use_cpu in its config file; without a GPU the CPU is taken in any case"
            )
        if deepspeed and config.precision == "fp64":
            raise ConfigError(
                "train.precision=fp64 is for proofs, DeepSpeed keeps weights in fp32: use train.engine=ddp"
            )
        started = int(os.environ.get("WORLD_SIZE", "1"))
        cpu = not torch.cuda.is_available()
        if cpu:
            keep_freed_memory()
        found = InitProcessGroupKwargs(init_method="attempt://", timeout=MEETING)
        plugin = None
        if deepspeed:
            plugin = zero.plugin(
                config.zero_stage,
                rows=config.local(started),
                accumulate=config.accumulate,
                clip=config.clip,
                offload_optimizer=config.offload_optimizer,
                offload_param=config.offload_param,
            )
            if config.compile and plugin.zero_stage == 3:
                raise ConfigError("train.compile=true cannot follow ZeRO-3, which brings weights together in between")
            found.backend = "gloo" if cpu else None
        self._accelerator = Accelerator(
            cpu=cpu and not deepspeed,  # else processes without GPUs find neither each other nor it
            mixed_precision="no",  # whatever the launcher says: see `autocast`
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulate),
            deepspeed_plugin=plugin,
            kwargs_handlers=[found],
        )
        self.world = World(self._accelerator.process_index, self._accelerator.num_processes)
        if started != self.world.size:
            raise ConfigError(f"the launcher started {started} processes, but {self.world.size} found each other")
        self._vote = Vote(self.world)  # here: until all are connected, a signal has to end a process that waits for it
        if self.world.size > 1:
            self.world.everyone(None)  # NCCL connects with the first collective, and by what it is told until then
            set_timeout(START_UP)
        self.device = self._accelerator.device
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self._config, self._stage = config, plugin and plugin.zero_stage
        self._half = HALF.get(config.precision)
        # A rank's loss is a mean over its rows, 1 / size of a micro-batch. Scaled by as much less (by a power of two,
        # which is exact), a row's gradient is the same float16 number whatever the number of ranks.
        self._share = 2.0 ** -(self.world.size - 1).bit_length()
        self._scaler = self._loss_scaler()
        self._norms: dict[str, Tensor] = {}
        self.threads = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # this process's share
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads)  # launchers say 1
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = config.tf32
        torch.backends.cuda.matmul.allow_tf32 = config.tf32

    @property
    def main(self) -> bool:
        return self._accelerator.is_main_process

    @property
    def has_tf32(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= (8, 0)

    @property
    def captures(self) -> bool:
        """Whether steps are to be captured as a CUDA graph; `uncapturable` may say why they cannot be."""
        return self._config.capture and self.device.type == "cuda"

    @property
    def uncapturable(self) -> str:
        """Why a CUDA graph cannot hold a step; nothing where it can."""
        if self._stage is not None:
            return "train.engine=deepspeed looks at numbers in between"
        if self.world.size > 1 and dist.get_backend() != "nccl":
            return f"the processes share gradients by {dist.get_backend()}, on the CPU"
        if torch.is_anomaly_enabled():
            return "debug.anomaly=true looks at every gradient"
        return ""

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """While it is entered, a step may be captured; of one that is broken off no gradient is left, nor its count."""
        made, groups = self._accelerator.step, self._optimizer.param_groups
        for group in groups:
            group["capturable"] = True  # Adam asks for the word; fused, it does the same without
        try:
            yield
        except BaseException:
            self._accelerator.step = made
            self.forget_gradients()
            raise
        finally:
            for group in groups:
                group["capturable"] = False

    def branching(self) -> AbstractContextManager[None]:
        """Within the capture: work that may be done beside the rest is."""
        return branch.branching(torch.cuda.Stream(self.device))

    def forget_gradients(self) -> None:
        self._optimizer.zero_grad()

    def describe(self) -> str:
        processes = "1 process" if self.world.size == 1 else f"{self.world.size} processes"
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{processes} on {name}" + ("" if self._stage is None else f", DeepSpeed ZeRO-{self._stage}")

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, snapshot: Snapshot | None
    ) -> Callable[..., dict[str, Tensor]]:
        """The objective as a callable whose backward averages gradients over ranks, going on from the snapshot.

        Raises CheckpointError when the snapshot is of another model.
        """
        objective.to(self.dtype)
        if snapshot is not None:
            load_weights(objective, snapshot)
        # Where the weights are averaged or divided, a copy that has all of them: see `observe`.
        apart = self._config.ema is not None or self._stage == 3
        self.observed: Any = deepcopy(objective).to(self.device) if apart else objective
        if self._config.compile:
            objective.compile(fullgraph=True, dynamic=False)  # the names of the weights stay
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # train.tf32 decides, not torch 2.11
        if self._config.ema is not None:
            optimizer.register_step_post_hook(Average(self._config.ema))
        model: Any = Autocast(objective, self.autocast, self._half if self._stage is None else None)
        if self._stage is None:
            # convolutions read weights that lie as their images do; DeepSpeed lays them out itself
            model.to(self.device, memory_format=torch.channels_last)
            self._gradients = Gradients(objective.parameters(), self.world)
            self._choose_adam()
        else:
            model, _ = self._accelerator.prepare(model, optimizer)
        self._objective, self._optimizer = objective, optimizer
        self._shares = zero.Shares(model.optimizer, objective, self.world, self.device) if self._stage else None
        if self._half == torch.float16 and self._shares:
            self._shares.zero.loss_scaler = self._scaler
        elif self._half == torch.float16 and self._stage == 0:
            model.torch_autocast_z0_gradscaler = self._scaler
        if snapshot is not None:
            self._restore(snapshot)
        return model

    def accumulate(self, model: Any) -> AbstractContextManager[Any]:
        """Around one micro-batch: gradients cross ranks, and the optimiser moves, at the last of a step only."""
        return self._accelerator.accumulate(model)

    def backward(self, loss: Tensor) -> None:
        with together("the backward pass and its all-reduce of gradients"):
            self._accelerator.backward(loss if self._stage is not None else self._scaler.scale(loss))
            branch.met()
            if self._stage is None and self._accelerator.sync_gradients:
                self._gradients.average()

    def step(self, number: int, measured: bool = False) -> None:
        """Moves the weights and forgets the gradients; before a step's last micro-batch it does nothing.

        measured: `gradient_norms` will be asked for.

        In fp16 it skips a step whose gradients overflow: they were averaged over ranks, so that all see the same. Fused
        Adam does so on the device, and nobody waits to learn of it; accelerate's wrapper would hide that it can.
        """
        if not self._accelerator.sync_gradients:
            return
        if self._stage is None:
            if measured:
                self._measure()
            if self._config.clip:
                self._scaler.unscale_(self._optimizer)
                nn.utils.clip_grad_norm_(self._objective.parameters(), self._config.clip)
            self._move()
            self._scaler.update()
            self.forget_gradients()
        elif self._shares and self._shares.zero.overflow and self._half != torch.float16:
            # DeepSpeed, which has moved the weights in `backward`, goes on without a word
            raise DivergedError(
                f"step {number}: the gradients are not finite; nothing of this step was saved; start a new run with a "
                "lower lr, or resume this with train.precision=fp32 if that was not it"
            )

    def _choose_adam(self) -> None:
        """Every rank calls it, and all take the same: two that round differently would drift apart."""
        ours = self.device.type == "cuda" and self.dtype == torch.float32 and adam.trusted_on(self.device)
        self._adam: AbstractContextManager[Any] = adam.Own() if all(self.world.everyone(ours)) else nullcontext()

    def _move(self) -> None:
        with self._adam:
            self._scaler.step(self._optimizer)

    def gradient_norms(self, step: int) -> dict[str, float]:
        """Of each player, in the measured `step` just made: of the whole batch's gradient, before clipping.

        Nothing under DeepSpeed, which has divided the gradients and forgotten them when its step returns, and nothing
        in fp16 where they overflowed. Raises DivergedError.
        """
        norms, self._norms = self._norms, {}
        if self._half == torch.float16:
            norms = {name: norm for name, norm in norms.items() if norm.isfinite()}
        return read(step, norms) if norms else {}

    def _measure(self) -> None:
        """Waits for nothing: the norms stay on the device."""
        scale = self._scaler.scale(torch.ones((), device=self.device))
        for group in self._optimizer.param_groups:
            gradients = [weight.grad for weight in group["params"] if weight.grad is not None]
            self._norms[f"grad_norm_{group['name'].replace(' ', '_')}"] = nn.utils.get_total_norm(gradients) / scale

    def overflows(self, step: int) -> dict[str, float]:
        """Of fp16: the loss scale, and how many of the `step` steps were skipped. Raises DivergedError."""
        if self._half != torch.float16:
            return {}
        scale = self.scaling()["loss_scale"]
        if scale < LAST_SCALE:
            raise DivergedError(
                f"step {step}: loss_scale={scale:g}, and the gradients still overflow float16; resume this with "
                "train.precision=bf16 or fp32"
            )
        state = next(iter(self._optimizer.state.values()), None)  # Adam counts the steps that moved something
        return {"loss_scale": scale, "skipped_steps": step - (float(state["step"]) if state else 0)}

    def scaling(self) -> dict[str, float]:
        """What a checkpoint keeps of loss scaling, whatever the processes and the engine; nothing but for fp16."""
        state = self._scaler.state_dict()  # empty but for fp16
        return {"loss_scale": state["scale"] / self._share, "steady": state["_growth_tracker"]} if state else {}

    def weights(self) -> Weights:
        """The weights and buffers by name, on the device, whole; every rank must call it."""
        whole = self._objective.state_dict()
        return whole | self._shares.gather() if self._shares and self._stage == 3 else whole

    def largest(self, weights: Weights) -> Weights:
        """The largest magnitude in each of what is trained of `weights`."""
        return {name: weights[name].abs().max() for name, _ in self._objective.named_parameters()}

    def moments(self) -> Weights:
        """What the optimiser keeps of every weight, by PARAMETER/NAME, on the device; every rank must call it.

        With train.ema the averaged weights are among them, as PARAMETER/ema.
        """
        if self._shares:
            return self._shares.moments()
        return {
            f"{name}/{key}": value
            for name, parameter in self._objective.named_parameters()
            for key, value in self._optimizer.state[parameter].items()
        }

    def observe(self) -> None:
        """Brings `observed` up to date; every rank must call it."""
        if self.observed is self._objective:
            return
        weights = self.weights()
        if self._config.ema is not None:
            weights |= averaged(self.moments())
        self.observed.load_state_dict(weights)

    def autocast(self) -> AbstractContextManager[Any]:
        """Around what the networks compute."""
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

    def _loss_scaler(self) -> Any:
        fp16, first = self._half == torch.float16, FIRST_SCALE * self._share
        if fp16 and self._stage:
            return zero.LossScaler(first, STEADY)
        return torch.amp.GradScaler(self.device.type, init_scale=first, growth_interval=STEADY, enabled=fp16)

    def _restore(self, snapshot: Snapshot) -> None:
        if self._shares:
            self._shares.put(snapshot.moments)
        else:
            for name, parameter in self._objective.named_parameters():
                keys = [key for key in snapshot.moments if key.rpartition("/")[0] == name]
                self._optimizer.state[parameter] = {
                    key.rpartition("/")[2]: _like(snapshot.moments[key], key, parameter) for key in keys
                }
        if snapshot.scaling:  # a run in another precision has none
            ours = {
                "scale": snapshot.scaling["loss_scale"] * self._share,
                "_growth_tracker": int(snapshot.scaling["steady"]),
            }
            self._scaler.load_state_dict(self._scaler.state_dict() | ours)


def load_weights(objective: nn.Module, snapshot: Snapshot) -> None:
    """Raises CheckpointError when the snapshot is of another model."""
    try:
        objective.load_state_dict(snapshot.weights)
    except RuntimeError as error:
        raise CheckpointError(f"{snapshot.path}: the weights are of another model: {error}") from error


def on_cpu(tensors: Weights) -> Weights:
    """Copies of their own."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _like(value: Tensor, key: str, parameter: nn.Parameter) -> Tensor:
    """A moment in the parameter's precision and layout; Adam's count of steps stays float32."""
    if key.endswith(f"/{zero.STEP}"):
        return value.to(parameter.device)
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


def _attempt(url: str, **more: Any) -> Iterator[tuple[Any, int, int]]:
    """The rendezvous of the environment, with keys of this attempt's own.

    A launcher that restarts its workers may keep the store, where they would find the addresses of dead ones.
    """
    for store, rank, size in rendezvous(url.replace("attempt:", "env:"), **more):
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        yield dist.distributed_c10d.PrefixStore(f"attempt {attempt}", store), rank, size


register_rendezvous_handler("attempt", _attempt)


def _refuse_one_of_several() -> None:
    """accelerate's simple launcher, when asked for several processes, prepares a rendezvous and then starts one."""
    prepared = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if prepared and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "accelerate was asked for several processes but started one; without GPUs launch them by "
            "`accelerate launch --multi_gpu --num_processes N vaedist/train.py ...` (if one is what you want, unset "
            "MASTER_ADDR and MASTER_PORT)"
        )
