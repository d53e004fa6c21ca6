"""Attributes added to held-out faces and taken away: codes moved along the attributes' directions."""

from collections.abc import Iterator

import numpy as np
import torch

from vaedist import attributes, pictures
from vaedist.evaluators import Picture, Subject

SHOWN, FACES, FRAMES = 4, 6, 13


def run(subject: Subject) -> Iterator[tuple[str, Picture]]:
    """Directions are of all training images; sets without labels have none, nor sets too large to be read whole.

    Those are the sets that are shuffled in windows (data.window).
    """
    manifest, config = subject.data.manifest, subject.config
    names = attributes.commonest(manifest, SHOWN) if config.attributes is None else config.attributes
    if not names or subject.data.window is not None:
        return
    directions = [attributes.direction(manifest, subject.codes("train").mean, name) for name in names]
    faces = subject.codes().mean[:FACES]

    original, _ = subject.images(np.zeros(1, dtype=np.int64))
    alphas = torch.tensor(attributes.ALPHAS)
    z = torch.cat([attributes.edited(faces[:1], towards, alphas) for towards in directions])
    strips = [torch.cat([original, subject.expected(strip)]) for strip in z]
    yield (
        "attributes",
        pictures.grid(
            subject.tiles(torch.cat(strips), 1 + len(alphas)),
            subject.caption("z + α (mean z with an attribute − mean z without)"),
            rows=names,
            columns=["original", *(f"α = {pictures.number(alpha)}" for alpha in attributes.ALPHAS)],
        ),
    )

    frames = []
    for alpha in torch.linspace(attributes.ALPHAS[0], attributes.ALPHAS[-1], FRAMES):
        z = torch.cat([attributes.edited(faces, towards, alpha[None])[:, 0] for towards in directions])
        caption = subject.caption(f"α = {pictures.signed(alpha.item())}")
        frames.append(pictures.grid(subject.tiles(subject.expected(z), len(faces)), caption, rows=names))
    yield "attributes_animation", pictures.there_and_back(frames)
