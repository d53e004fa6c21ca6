"""The held-out ELBO: every image that is looked at once, one draw of z each, whatever the number of ranks."""

from collections.abc import Iterator

import torch

from vaedist.evaluators import Subject


def run(subject: Subject) -> Iterator[tuple[str, float]]:
    objective, q = subject.objective, subject.codes()
    total = torch.zeros((), dtype=torch.float64, device=subject.backend.device)
    for ids in subject.share():
        images, noise = subject.images(ids)
        total += objective.likelihood.nll(objective.vae.decode(q.z[ids], noise), images).double().sum()
    recon = (subject.world.sum(total) / subject.count).item()
    kl = q.kl().double().sum(1).mean().item()
    yield "recon", recon
    yield "kl", kl
    yield "elbo", -(recon + kl)
