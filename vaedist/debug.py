"""Whether a run has gone astray: terms that are not finite, ranks that no longer hold the same model, bit for bit."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaedist.config import bounded
from vaedist.noise import GOLDEN, mix
from vaedist.world import World

CHUNK = 2**22  # bytes hashed at once: few enough for a cache, many enough for few kernels


class DriftError(Exception):
    """The ranks hold different models, which averaged gradients hide."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The switches are those of `watch`."""

    replicas: int = bounded(1000, at_least=1)  # steps between two comparisons; one more goes before every checkpoint
    deterministic: bool = False  # refuse operations that torch does not promise to repeat bit for bit
    anomaly: bool = False  # name the operation that a NaN in a backward pass comes from; a step takes twice the time
    profile: int = bounded(0, at_least=0)  # steps of which RUN/profile/ gets a trace of every rank
    memory: bool = False  # log perf/memory_gb


class DivergedError(Exception):
    """A term became NaN or infinite."""


def refuse_nonfinite(step: int, terms: Mapping[str, float | list[float]]) -> None:
    """Raises DivergedError, naming step and terms, unless all are finite numbers; a list is of replicas."""
    single: dict[str, float] = {}
    for name, value in terms.items():
        if isinstance(value, list):
            single |= {f"{name} of replica {number}": own for number, own in enumerate(value)}
        else:
            single[name] = value
    bad = [f"{name}={value}" for name, value in single.items() if not math.isfinite(value)]
    if bad:
        more = [f"{len(bad) - 5} more"] if len(bad) > 5 else []
        raise DivergedError(
            f"step {step}: {', '.join(bad[:5] + more)}; nothing of this step was saved; start a new run with a lower "
            "lr, or resume this with train.precision=fp32 if that was not it"
        )


def read(step: int, terms: dict[str, Tensor]) -> dict[str, Any]:
    """The values of scalars, of replicas lists, copied from the device at once. Raises DivergedError."""
    values = dict(zip(terms, torch.stack([term.double() for term in terms.values()]).tolist(), strict=True))
    refuse_nonfinite(step, values)
    return values


def digest(tensor: Tensor) -> Tensor:
    """A hash of the bytes of a tensor and of their places, an int64 scalar on its device.

    Sums are modulo 2^64, where their order does not matter, and `mix` is one-to-one: one changed number always shows.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, chunk in enumerate(tensor.detach().reshape(-1).view(torch.uint8).split(CHUNK)):
        words = F.pad(chunk, (0, -len(chunk) % 8)).view(torch.int64)
        places = torch.arange(len(words), device=words.device) + number * (CHUNK // 8)
        total += mix(words + places * GOLDEN).sum()
    return total


def compare_replicas(step: int, model: nn.Module, world: World) -> None:
    """Raises DriftError, on every rank, where a parameter or buffer is not the same on all; every rank must call it.

    Moments are left out, which would make four times the work: where they differ, so do the weights that they move in
    the next step.
    """
    if world.size == 1:
        return
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    everyone = world.gather(torch.stack([digest(tensor) for tensor in tensors.values()])[None])  # [ranks, tensors]
    for name, digests in zip(tensors, everyone.T.tolist(), strict=True):
        usual, count = Counter(digests).most_common(1)[0]  # of equally many, rank 0's
        if count < world.size:
            odd = [str(rank) for rank, other in enumerate(digests) if other != usual]
            raise DriftError(
                f"step {step}: {name} of rank {', '.join(odd)} is not that of rank {digests.index(usual)}: the "
                f"{world.size} processes no longer train the same model; none of this was saved, the same command "
                "resumes from the last checkpoint; if it happens again on the same rank, suspect its device"
            )
