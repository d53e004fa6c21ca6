"""How alike images are, without weights: pure functions of images [n, C, H, W] with pixels in [0, 1]."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vaedist.noise import Noise

WINDOW, DEVIATION = 11, 1.5  # pixels, of the Gaussian window of SSIM
C1, C2 = 0.01**2, 0.03**2
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales of MS-SSIM, the finest first
COARSEST = 16  # pixels a side of the last level of a pyramid, or somewhat more
PATCH = 7  # pixels a side
ROUNDING = 1 / (12 * 255**2)  # the mean square of what 8 bits leave away


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, [n]; at most the 58.9 of images that differ by the rounding to 8 bits."""
    return -10 * (a - b).square().flatten(1).mean(1).clamp_min(ROUNDING).log10()


def ssim(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """SSIM (Wang et al. 2004) and MS-SSIM (Wang et al. 2003), [n] each, means over channels.

    Over the positions where the window lies within the image. MS-SSIM has as many of its five scales as the window
    fits into, three at 64 pixels, and their weights divided by their sum. Negative factors count as 0.
    Raises ValueError where the window does not fit once.
    """
    scales = sum(min(a.shape[2:]) >> scale >= WINDOW for scale in range(len(WEIGHTS)))
    if not scales:
        raise ValueError(f"SSIM needs images of {WINDOW} pixels a side at least")
    weights = [weight / sum(WEIGHTS[:scales]) for weight in WEIGHTS[:scales]]
    finest, multiscale = torch.ones(()), torch.ones(())
    for scale, weight in enumerate(weights):
        luminance, contrast = _ssim_maps(a, b)
        similar = (luminance * contrast).flatten(1).mean(1)
        finest = finest if scale else similar
        factor = similar if scale == scales - 1 else contrast.flatten(1).mean(1)
        multiscale = multiscale.to(factor) * factor.relu() ** weight
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return finest, multiscale


def _ssim_maps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The luminance term, and contrast times structure, at every position of the window."""
    at = torch.arange(WINDOW, dtype=a.dtype, device=a.device) - WINDOW // 2
    window = torch.softmax(-0.5 * (at / DEVIATION).square(), 0)
    mean_a, mean_b, aa, bb, ab = _separable(torch.stack([a, b, a * a, b * b, a * b]).flatten(0, 1), window).chunk(5)
    luminance = (2 * mean_a * mean_b + C1) / (mean_a.square() + mean_b.square() + C1)
    variances = aa - mean_a.square() + bb - mean_b.square()
    return luminance, (2 * (ab - mean_a * mean_b) + C2) / (variances + C2)


def pyramid(images: Tensor) -> list[Tensor]:
    """The levels of a Laplacian pyramid (Burt & Adelson 1983), the finest first; the last is what remains."""
    levels = []
    while images.shape[2] % 2 == images.shape[3] % 2 == 0 and min(images.shape[2:]) >= 2 * COARSEST:
        half = _blur(images)[:, :, ::2, ::2]
        spread = torch.zeros_like(images)
        spread[:, :, ::2, ::2] = half
        levels.append(images - 4 * _blur(spread))
        images = half
    return [*levels, images]


def patches(level: Tensor, noise: Noise, count: int) -> Tensor:
    """`count` patches of every image at places that its noise tells, [n, count, C * PATCH * PATCH]."""
    windows = level.unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # [n, C, y, x, PATCH, PATCH]
    y, x = (noise.bits(f"patches {axis}", count) % windows.shape[axis] for axis in (2, 3))
    return windows[torch.arange(len(level), device=level.device)[:, None], :, y, x].flatten(2)


def slices(points: Tensor, directions: int) -> Tensor:
    """The points [n, d] projected on so many directions, the same for all, and sorted: [directions, n].

    Of two sets of n points the mean absolute difference of their slices is the sliced Wasserstein-1 distance
    (Rabin et al. 2012; Bonneel et al. 2015).
    """
    axes = Noise(0, torch.arange(directions, device=points.device)).normal("directions", points.shape[1], points.dtype)
    return (F.normalize(axes, dim=1) @ points.T).sort(1).values


def _blur(images: Tensor) -> Tensor:
    kernel = images.new_tensor([1, 4, 6, 4, 1]) / 16
    return _separable(F.pad(images, (2, 2, 2, 2), mode="reflect"), kernel)


def _separable(images: Tensor, kernel: Tensor) -> Tensor:
    """Every channel convolved with the kernel along both axes, where it lies within the image.

    By matrices: a CPU is slow at convolutions of single channels.
    """
    rows, columns = (_bands(kernel, side) for side in images.shape[2:])
    return rows @ images @ columns.T


def _bands(kernel: Tensor, side: int) -> Tensor:
    """The kernel at every place of a line of `side` pixels, [places, side]."""
    places = side - len(kernel) + 1
    return torch.stack([F.pad(kernel, (place, places - 1 - place)) for place in range(places)])
