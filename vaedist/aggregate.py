"""The aggregate posterior q(z), the mean over the training images of q(z | x), estimated from the batch of all ranks.

Every rank computes the pairs of its own rows with the rows of all, chunk by chunk, and computes a chunk again in the
backward pass: the work is O(B^2 / world size), the memory that of one chunk and of all rows once.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vaedist.config import ConfigError
from vaedist.noise import Noise
from vaedist.posterior import Posterior
from vaedist.world import World

CHUNK = 2**22  # pairs x latents computed at once: 16 MiB in float32, some ten such tensors in a backward pass
ACTIVE = 0.01  # variance of the posterior mean above which a latent is active (Burda et al. 2016)


class Weights(NamedTuple):
    """What the estimate of q(z_i) takes of q(z_i | x_j): of the row itself, of the row after it, of any other."""

    own: float
    after: float
    other: float


def weighted(batch: int, images: int) -> Weights:
    """Minibatch-weighted sampling with its constants: 1 / (N B) for every row (Chen et al. 2018, section 3.1)."""
    return Weights(*[1 / (images * batch)] * 3)


def stratified(batch: int, images: int) -> Weights:
    """Minibatch-stratified sampling, M = B - 1 (Chen et al. 2018, appendix C.2): unbiased for q(z).

    The code published with the paper writes the special weights down a column of its matrix, not along the diagonals.
    Raises ConfigError for a batch that the estimate is not defined for.
    """
    others = batch - 1
    if not 0 < others < images:
        raise ConfigError(
            f"minibatch-stratified sampling needs 2 to {images} images a batch, train.batch={batch}: change that, or "
            "say objective.sampling=mws"
        )
    return Weights(1 / images, (images - others) / (images * others), 1 / others)


def averaged(batch: int, images: int) -> Weights:
    """`stratified` averaged over which of the others is the row after: as unbiased, and with less variance.

    The less, the more of the set the batch is; of the whole set it is exact.
    """
    other = (images - 1) / (images * max(1, batch - 1))
    return Weights(1 / images, other, other)


class _ByRows(torch.autograd.Function):
    """Computes part after part, and a part again in the backward pass, so that no more than one is ever held.

    torch.utils.checkpoint does so too, but keeps a little of every part: small blocks that leave the heap of a CPU in
    pieces too small for the next part, gigabytes of them.
    """

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., Tensor], parts: Sequence[slice], *tensors: Tensor) -> Tensor:
        ctx.compute, ctx.parts = compute, parts
        ctx.save_for_backward(*tensors)
        first = compute(parts[0], *tensors)
        values = first.new_empty(parts[-1].stop, *first.shape[1:])  # at once: small blocks would cut up the heap
        values[parts[0]] = first
        for part in parts[1:]:
            values[part] = compute(part, *tensors)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        for part in ctx.parts:
            with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
                (grad[part] * ctx.compute(part, *tensors)).sum().backward()  # adds to tensor.grad
        return None, None, *(tensor.grad for tensor in tensors)


def by_rows(compute: Callable[..., Tensor], rows: int, cost: int, *tensors: Tensor) -> Tensor:
    """`compute(part, *tensors)` of all rows, in parts (slices) that hold about `CHUNK` numbers at a `cost` of each row.

    `compute` gives the rows of its part, and takes every tensor that needs a gradient as an argument.
    """
    step = max(1, CHUNK // cost)
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    return compute(*parts, *tensors) if len(parts) == 1 else _ByRows.apply(compute, parts, *tensors)


def log_density(z: Tensor, positions: Tensor, everyone: Posterior, columns: Tensor, weights: Weights) -> Tensor:
    """log q(z) and log q(z_d) of every latent, [rows, 1 + latent].

    z [rows, latent] are drawn from the images at `positions` [rows]; `everyone` are the posteriors of the whole batch,
    of the images at `columns` [batch].
    """
    own, after, other = (math.log(weight) if weight else -math.inf for weight in weights)

    def compute(part: slice, z: Tensor, *latents: Tensor) -> Tensor:
        ahead = (columns - positions[part, None]) % len(columns)
        weight = torch.full_like(ahead, other, dtype=z.dtype)
        weight = weight.masked_fill(ahead == 1, after).masked_fill(ahead == 0, own)
        pairs = type(everyone)(*latents).log_density(z[part])  # [rows, batch, latent]
        joint = torch.logsumexp(weight + pairs.sum(2), dim=1)
        marginals = torch.logsumexp(weight[:, :, None] + pairs, dim=1)
        return torch.cat([joint[:, None], marginals], dim=1)

    return by_rows(compute, len(z), len(columns) * z.shape[1], z, *everyone)


class Decomposition(NamedTuple):
    """kl = mi + tc + dwkl (Chen et al. 2018, eq. 2), in nats."""

    mi: Tensor  # of the image and z
    tc: Tensor
    dwkl: Tensor  # dimension-wise KL to the prior


def decompose(
    q: Posterior, noise: Noise, world: World, weights: Callable[[int, int], Weights], images: int
) -> Decomposition:
    """The decomposition of the whole batch, as means over this rank's rows; their mean over ranks is that of the batch.

    tc and dwkl are differences of log densities at the same draws; mi is the analytic kl less their sum, which is
    KL(q(z) || p(z)): the noise of the draws cancels where q(z) is near the prior, and the terms sum to the kl.
    """
    *latents, columns = world.gather_together(*q, noise.positions)
    estimate = log_density(q.z, noise.positions, type(q)(*latents), columns, weights(len(columns), images))
    joint, marginals = estimate[:, 0], estimate[:, 1:].sum(1)
    tc, dwkl = (joint - marginals).mean(), (marginals - q.log_prior().sum(1)).mean()
    return Decomposition(mi=q.kl().sum(1).mean() - tc - dwkl, tc=tc, dwkl=dwkl)


def report(q: Posterior, noise: Noise, world: World, images: int) -> dict[str, Tensor]:
    """What every run tells of its latents, whatever its objective: of the whole batch, the same on every rank.

    The decomposition of the KL, the number of active latents, and the KL of every latent.
    """
    parts = decompose(q, noise, world, averaged, images)
    kl = world.mean(q.kl().mean(0))
    variance = world.mean((q.mean - world.mean(q.mean.mean(0))).square().mean(0))
    terms = {"kl": kl.sum()} | {name: world.mean(part) for name, part in parts._asdict().items()}
    terms["active_units"] = (variance > ACTIVE).sum()
    return terms | {f"kl_{number:02d}": value for number, value in enumerate(kl)}
