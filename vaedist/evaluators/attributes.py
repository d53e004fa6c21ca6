"""Attributes added to held-out faces and taken away: codes moved along the attributes' directions."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from shards.manifest import Manifest
from vaedist import attributes, pictures
from vaedist.config import ConfigError
from vaedist.evaluators import Config, Subject
from vaedist.pictures import Picture

SHOWN, FACES, FRAMES = 4, 6, 13


def require(config: Config, manifest: Manifest, latents: int) -> None:
    """Raises ConfigError unless the set has each of the attributes, and images with and without it."""
    for name in config.attributes or ():
        try:
            attributes.column(manifest, name)
        except ConfigError as error:
            raise ConfigError(f"evaluate.attributes: {error}") from None


def run(subject: Subject) -> Iterator[tuple[str, Picture]]:
    """Directions are of all training images; sets without labels have none, nor sets too large to be read whole.

    Those are the sets that are shuffled in windows (data.window).
    """
    manifest, config = subject.data.manifest, subject.config
    names = attributes.commonest(manifest, SHOWN) if config.attributes is None else config.attributes
    if not names or subject.data.window is not None:
        return
    directions = [attributes.direction(manifest, subject.codes("train").mean, name) for name in names]
    faces, alphas = subject.codes().mean[:FACES], torch.tensor(attributes.ALPHAS)
    original, _ = subject.images(np.zeros(len(names), dtype=np.int64))
    z = torch.cat([attributes.edited(faces[:1], towards, alphas) for towards in directions])
    yield "attributes", strip(subject, original, z, "z + α (mean z with an attribute − mean z without)", names)
    yield "attributes_animation", animation(subject, faces, directions, "attributes", rows=names)


def strip(subject: Subject, originals: Tensor, z: Tensor, what: str, rows: Sequence[str]) -> Picture:
    """A row for each original and its edits: [n, C, H, W] and [n, alphas, latent]."""
    edits = subject.expected(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    tiles = subject.tiles(torch.cat([originals[:, None], edits], 1).flatten(0, 1), 1 + len(attributes.ALPHAS))
    columns = ["original", *(f"α = {pictures.number(alpha)}" for alpha in attributes.ALPHAS)]
    return pictures.grid(tiles, subject.caption(what), rows=rows, columns=columns)


def animation(
    subject: Subject,
    faces: Tensor,
    directions: Sequence[Tensor],
    what: str,
    *,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> Picture:
    """A row for each direction [latent], in which all codes [n, latent] move along it."""
    frames = []
    for alpha in torch.linspace(attributes.ALPHAS[0], attributes.ALPHAS[-1], FRAMES):
        z = torch.cat([attributes.edited(faces, towards, alpha[None])[:, 0] for towards in directions])
        caption = subject.caption(f"{what} · α = {pictures.signed(alpha.item())}")
        tiles = subject.tiles(subject.expected(z), len(faces))
        frames.append(pictures.grid(tiles, caption, rows=rows, columns=columns))
    return pictures.there_and_back(frames)
