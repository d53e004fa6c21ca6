"""The held-out ELBO: every image that is looked at once, one draw of z each, whatever the number of ranks."""

from collections.abc import Iterator

import torch

from vaedist.evaluators import Subject


def run(subject: Subject) -> Iterator[tuple[str, float]]:
    objective = subject.objective
    count = subject.count
    sums = torch.zeros(2, dtype=torch.float64, device=subject.backend.device)
    for images, noise in subject.share(count):
        q = objective.posterior(images, noise)
        recon = objective.likelihood.nll(objective.vae.decode(q.z, noise), images)
        kl = q.kl().sum(1)
        sums += torch.stack([recon, kl]).double().sum(1)
    recon, kl = (subject.world.sum(sums) / count).tolist()
    yield "recon", recon
    yield "kl", kl
    yield "elbo", -(recon + kl)
