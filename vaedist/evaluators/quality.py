"""How good the images are, without weights of another network: PSNR, SSIM, MS-SSIM, sliced Wasserstein distances.

PSNR, SSIM and MS-SSIM are of reconstructions from the posterior mean, means over all held-out images. The sliced
Wasserstein distance is that of patches of a Laplacian pyramid, level by level (Karras et al. 2018, section 5), between
held-out images and as many reconstructions or samples; it is 0 for equal distributions. Deviations: PATCHES patches of
the first IMAGES images and DIRECTIONS directions, where the paper has 128, 16,384 and 512; and both sets are scaled by
the held-out patches' mean and standard deviation, by channel, so that what a blurred image lacks is seen.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vaedist.data.order import Ids
from vaedist.evaluators import Subject
from vaedist.evaluators._sets import Images, held_out, reconstructions, samples, together
from vaedist.similarity import PATCH, patches, psnr, pyramid, slices, ssim

IMAGES, PATCHES, DIRECTIONS = 2048, 32, 64
LEAST = 1 / 255  # of a standard deviation: where held-out images have no detail, one step of 8 bits is the unit


def run(subject: Subject) -> Iterator[tuple[str, float]]:
    def scores(ids: Ids) -> tuple[Tensor]:
        pair = held_out(subject, ids), reconstructions(subject, ids)
        return (torch.stack([psnr(*pair), *ssim(*pair)], 1),)

    (every,) = together(subject, subject.count, scores)
    yield from zip(("psnr", "ssim", "ms_ssim"), every.double().mean(0).tolist(), strict=True)
    held = _patches(subject, held_out)
    scales = {side: (found.mean((0, 2), keepdim=True), found.std((0, 2), keepdim=True)) for side, found in held.items()}

    def sliced(found: dict[int, Tensor]) -> dict[int, Tensor]:
        return {
            side: slices(((found[side] - mean) / deviation.clamp_min(LEAST)).flatten(1), DIRECTIONS)
            for side, (mean, deviation) in scales.items()
        }

    expected = sliced(held)
    for what in (reconstructions, samples):
        found = sliced(_patches(subject, what))
        distances = {side: (found[side] - expected[side]).abs().mean(dtype=torch.float64).item() for side in expected}
        yield f"swd_{what.__name__}", sum(distances.values()) / len(distances)
        for side, distance in distances.items():
            yield f"swd_{what.__name__}_{side}", distance


def _patches(subject: Subject, of: Images) -> dict[int, Tensor]:
    """The patches of a set of images by their level's side in pixels, [images * PATCHES, C, PATCH * PATCH] each."""
    sides: list[int] = []

    def levels(ids: Ids) -> tuple[Tensor, ...]:
        found = pyramid(of(subject, ids))
        sides[:] = [level.shape[3] for level in found]
        return tuple(patches(level, subject.noise(ids).fork(str(level.shape[3])), PATCHES) for level in found)

    rows = together(subject, min(IMAGES, subject.count), levels)
    return {side: found.flatten(0, 1).unflatten(1, (-1, PATCH**2)) for side, found in zip(sides, rows, strict=True)}
