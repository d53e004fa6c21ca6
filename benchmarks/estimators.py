"""What the estimates of q(z) make of TC, its gradient, MI and dwKL at batches of 8 to 4096, against the truth.

    ./run python benchmarks/estimators.py           the tables of docs/objectives.md, some minutes on one core
    ./run python benchmarks/estimators.py share     memory and time of one of 64 ranks that share 65,536 latents

The set: 20,000 images, 10 latents of which 5 are active: posteriors of standard deviation 0.4 whose means are Gaussian,
two of them correlated by 0.7, scaled so that every latent of the aggregate has the prior's variance. It is close to a
Gaussian of known terms, its limit for infinitely many images. The gradient is the one training sees, of the estimate
through posteriors and draws, with respect to that correlation.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vaedist.aggregate import Weights, averaged, decompose, log_density, stratified, weighted
from vaedist.gaussian import Posterior, kl, sample
from vaedist.noise import Noise
from vaedist.world import World

IMAGES, LATENT, ACTIVE = 20_000, 10, 5
SIGMA, CORRELATION = 0.4, 0.7
ESTIMATES = {"MWS": weighted, "MSS": stratified, "averaged": averaged}
REPEATS = {8: 1000, 16: 1000, 64: 400, 256: 100, 1024: 24, 4096: 6}
BLOCK = 1000  # draws a turn of the truth
TERMS = ("TC", "dTC / d correlation", "MI", "dwKL")


def posteriors(seed: int, images: Tensor, correlation: Tensor) -> Posterior:
    """The posteriors of some images of the set, and a draw of each that `seed` decides."""
    normal = Noise(0, images).normal("set", LATENT)
    second = correlation * normal[:, 0] + (1 - correlation.square()).sqrt() * normal[:, 1]
    active = torch.cat([normal[:, :1], second[:, None], normal[:, 2:ACTIVE]], dim=1)
    mu = torch.cat([math.sqrt(1 - SIGMA**2) * active, torch.zeros_like(normal[:, ACTIVE:])], dim=1)
    logvar = torch.zeros_like(mu)
    logvar[:, :ACTIVE] = 2 * math.log(SIGMA)
    return Posterior(mu, logvar, sample(mu, logvar, Noise(seed, images).normal("draw", LATENT)))


def estimate(weights: Callable[[int, int], Weights], batch: int, turn: int) -> list[float]:
    """TERMS as one batch of the set gives them."""
    correlation = torch.tensor(CORRELATION, requires_grad=True)
    images = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(turn))[:batch]
    mi, tc, dwkl = decompose(
        posteriors(turn, images, correlation), Noise(turn, torch.arange(batch)), World(), weights, IMAGES
    )
    (slope,) = torch.autograd.grad(tc, correlation)
    return [tc.item(), slope.item(), mi.item(), dwkl.item()]


def exact(turn: int, block: int = BLOCK) -> list[float]:
    """TERMS at draws of the next `block` images, under the mixture of all posteriors of the set."""
    correlation, images = torch.tensor(CORRELATION, requires_grad=True), torch.arange(IMAGES)
    everyone, own = posteriors(turn, images, correlation), images[turn * block :][:block]
    density = log_density(everyone.z[own], own, everyone, images, averaged(IMAGES, IMAGES))
    joint, marginals = density[:, 0], density[:, 1:].sum(1)
    tc, dwkl = (joint - marginals).mean(), (marginals - everyone.log_prior()[own].sum(1)).mean()
    (slope,) = torch.autograd.grad(tc, correlation)
    return [tc.item(), slope.item(), (everyone.kl().sum(1).mean() - tc - dwkl).item(), dwkl.item()]


def limit() -> list[float]:
    """TERMS of the Gaussian that the set tends to with ever more images."""
    r = (1 - SIGMA**2) * CORRELATION
    tc = -0.5 * math.log(1 - r**2)
    mu, logvar = torch.tensor(math.sqrt(1 - SIGMA**2)), torch.tensor(2 * math.log(SIGMA))
    return [tc, (1 - SIGMA**2) * r / (1 - r**2), ACTIVE * kl(mu, logvar).item() - tc, 0.0]


def summary(values: list[list[float]]) -> list[tuple[float, float]]:
    """Mean and standard error of each of TERMS, of the lists that some turns gave."""
    return [(statistics.fmean(term), statistics.stdev(term) / len(term) ** 0.5) for term in zip(*values, strict=True)]


def tables() -> None:
    """Prints a Markdown table for each of TERMS."""
    truth = summary([exact(turn) for turn in range(IMAGES // BLOCK)])
    found = {
        name: {batch: summary([estimate(weights, batch, turn) for turn in range(n)]) for batch, n in REPEATS.items()}
        for name, weights in ESTIMATES.items()
    }
    for k, term in enumerate(TERMS):
        mean, error = truth[k]
        print(f"\n{term}: {mean:.3f} ± {error:.3f} of the set, {limit()[k]:.3f} of its limit\n")
        print(f"| batch | {' | '.join(map(str, REPEATS))} |\n|---|{'---|' * len(REPEATS)}")
        for name, cells in found.items():
            numbers = (cells[batch][k] for batch in REPEATS)
            print(f"| {name} | {' | '.join(f'{mean:.2f} ± {error:.2f}' for mean, error in numbers)} |")


def share(rows: int, batch: int) -> float:
    """Seconds of the estimate and its gradient, for a rank that has so many rows of a batch."""
    torch.manual_seed(0)
    mu, logvar, z = torch.randn(3, batch, LATENT).unbind()
    everyone = Posterior(mu.requires_grad_(), logvar.requires_grad_(), z.requires_grad_())
    columns, start = torch.arange(batch), time.perf_counter()
    log_density(everyone.z[:rows], columns[:rows], everyone, columns, averaged(batch, IMAGES)).mean().backward()
    return time.perf_counter() - start


def peak() -> int:
    """The most bytes of memory that this process has held, since it began (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("tables", "share"), default="tables")
    if parser.parse_args().what == "tables":
        tables()
        return
    ranks, batch = 64, 65_536
    share(2, 2)  # what torch itself needs
    before, rows = peak(), batch // ranks
    seconds = share(rows, batch)
    print(
        f"{rows:,} rows against {batch:,}, {LATENT} latents, float32, forward and backward: {seconds:.1f} s with ",
        end="",
    )
    print(f"{torch.get_num_threads()} threads, {peak() - before:,} bytes more than before the batch")
    print(f"one tensor of all these pairs: {4 * rows * batch * LATENT:,} bytes")


if __name__ == "__main__":
    main()
