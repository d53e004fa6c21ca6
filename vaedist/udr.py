"""accelerate launch -m vaedist.udr RUN RUN [RUN ...] [key.path=value ...]    which runs agree: no labels needed

The unsupervised disentanglement ranking (Duan et al. 2020): runs of other seeds that found the same latents, but for
their order and sign, are likely to be disentangled.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from vaedist.backend import Backend
from vaedist.evaluate import observed, recipe_of, start_on
from vaedist.recipe import load
from vaedist.words import is_setting

INFORMATIVE = 0.01  # nats: a latent of less KL tells nothing of the images


def udr(codes: list[np.ndarray], kls: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The scores of every run, [runs], by lasso and by Spearman's correlation: the median over the other runs.

    codes: of the same images under every run, [n, latent] each; kls: the mean KL of their latents, [latent] each. As in
    the authors' code, part of disentanglement_lib, a pair's score is the mean of that over rows and that over columns.
    """
    kept = [(kl > INFORMATIVE) & (np.ptp(z, axis=0) > 0) for z, kl in zip(codes, kls, strict=True)]
    standard = [standardised(z[:, which]) for z, which in zip(codes, kept, strict=True)]
    found = {}
    for name, similarity in (("lasso", lasso), ("spearman", spearman)):
        pairs = [
            [agreement(similarity(other, own)) for j, other in enumerate(standard) if j != i]
            for i, own in enumerate(standard)
        ]
        found[name] = np.median(pairs, axis=1)
    return found


def standardised(codes: np.ndarray) -> np.ndarray:
    return (codes - codes.mean(axis=0)) / codes.std(axis=0)


def lasso(other: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How much each latent of another run weighs in a sparse regression of each of one's own, [other, own]."""
    from sklearn.linear_model import Lasso

    if not other.shape[1] or not own.shape[1]:
        return np.zeros((other.shape[1], own.shape[1]))
    return np.abs(Lasso(alpha=0.1).fit(other, own).coef_.reshape(own.shape[1], -1).T)


def spearman(other: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The correlation of the ranks of the images, without its sign, [other, own]."""
    from scipy.stats import rankdata

    first, second = (standardised(rankdata(codes, axis=0)) for codes in (other, own))
    return np.abs(first.T @ second) / len(own)


def agreement(similarity: np.ndarray) -> float:
    """Each latent's largest similarity, squared, as a share of the sum of all: from 1, one to one, down to 0."""
    means = []
    for rows in (similarity, similarity.T):
        best, sums = rows.max(axis=1, initial=0), rows.sum(axis=1)
        shares = np.divide(best**2, sums, out=np.zeros_like(sums), where=sums > 0)
        means.append(shares.mean() if len(shares) else 0.0)
    return float(np.mean(means))


def rank(runs: list[str], words: list[str], backend: Backend) -> None:
    """Scores the newest checkpoints of runs and writes udr.json beside the first; every rank calls it.

    Raises one of the trainer's USER_ERRORS.
    """
    from shards.files import replacing
    from vaedist.config import ConfigError
    from vaedist.console import Console

    console = Console(main=backend.main)
    codes, kls, rows, sets = [], [], [], set()
    for run in runs:
        subject, _ = observed(load(recipe_of(run, words))[0], backend, console)
        with torch.no_grad(), backend.autocast():
            q = subject.codes()
        codes.append(q.mean.double().cpu().numpy())
        kls.append(q.kl().double().mean(0).cpu().numpy())
        rows.append({"run": run, "step": subject.step})
        sets.add((subject.data.digest, subject.count))
    if len(sets) > 1:
        raise ConfigError(f"{', '.join(runs)}: these runs do not look at the same images of the same set")
    with threadpool_limits(limits=1):  # whose sums are the same whatever the number of processes
        found = udr(codes, kls)
    for name, scores in found.items():
        for row, score in zip(rows, scores.tolist(), strict=True):
            row[f"udr_{name}"] = score
    for row in rows:
        console.say(f"udr_lasso {row['udr_lasso']:.4f}  udr_spearman {row['udr_spearman']:.4f}  {row['run']}")
    path = Path(runs[0]).parent / "udr.json"
    if backend.main:
        with replacing(path) as file:
            file.write(f"{json.dumps(rows, indent=1, allow_nan=False)}\n".encode())
    console.say(f"{len(runs)} runs on {len(codes[0])} images; see {path}")


if __name__ == "__main__":
    runs = list({Path(word).resolve(): word for word in sys.argv[1:] if not is_setting(word)}.values())  # each once
    if len(runs) < 2:
        sys.exit("usage: accelerate launch -m vaedist.udr RUN RUN [RUN ...] [key.path=value ...]")
    words = ["evaluate.names=[]", *(word for word in sys.argv[1:] if is_setting(word))]  # none of them is run
    start_on(runs[0], words, lambda _, backend, __: rank(runs, words, backend))
