"""Measures of images against their definitions, and the same numbers from any number of ranks."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vaedist import evaluators
from vaedist.evaluators import Subject, quality
from vaedist.evaluators._sets import held_out, reconstructions, samples, together
from vaedist.gaussian import Posterior
from vaedist.likelihood import Likelihood
from vaedist.noise import Noise
from vaedist.similarity import PATCH, patches, psnr, pyramid, slices, ssim
from vaedist.world import World

SIDE, COUNT = 32, 7


def identity(blur: bool = False, side: int = SIDE, count: int = COUNT, world: World = World()) -> Subject:  # noqa: B008
    """A VAE whose latents are the pixels, in [-1, 1]; `blur` decodes the mean of every 4 x 4 block."""
    shape = (3, side, side)
    images = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def decode(z, noise):
        decoded = z.view(-1, *shape)
        return decoded.unfold(2, 4, 4).unfold(3, 4, 4).mean((4, 5)).repeat_interleave(4, 2).repeat_interleave(4, 3) \
            if blur else decoded  # fmt: skip

    def posterior(images, noise):
        mu = images.flatten(1)
        return Posterior(mu, torch.zeros_like(mu), mu + 9)

    objective = SimpleNamespace(
        vae=SimpleNamespace(decode=decode, pixel_range=(-1.0, 1.0)),
        likelihood=Likelihood("gaussian", 1.0),
        posterior=posterior,
        nearest=lambda z: z,
        prior=lambda noise, dtype: noise.chance("prior", 3 * side * side, 0.5).to(dtype) * 2 - 1,
    )
    data = SimpleNamespace(valid=SimpleNamespace(count=count, gather=lambda ids: images[ids]))
    backend = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float64, autocast=nullcontext, main=True)
    return Subject(evaluators.Config(), objective, data, world, backend, step=0)


def pair(side: int, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(side)
    a = torch.rand(count, 3, side, side, dtype=torch.float64, generator=generator)
    return a, (a + 0.2 * torch.randn(a.shape, dtype=a.dtype, generator=generator)).clamp(0, 1)


def by_definition(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """SSIM and its contrast-structure term of one channel, position by position (Wang et al. 2004, section III-B)."""
    y, x = np.mgrid[-5:6, -5:6]
    window = np.exp(-(x**2 + y**2) / (2 * 1.5**2))
    window /= window.sum()
    whole, contrast = [], []
    for row in range(a.shape[0] - 10):
        for column in range(a.shape[1] - 10):
            p, q = (image[row : row + 11, column : column + 11] for image in (a, b))
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            covariance = (window * (p - mp) * (q - mq)).sum()
            contrast.append((2 * covariance + 0.03**2) / (vp + vq + 0.03**2))
            whole.append((2 * mp * mq + 0.01**2) / (mp**2 + mq**2 + 0.01**2) * contrast[-1])
    return np.mean(whole), np.mean(contrast)


def test_ssim_and_ms_ssim_are_those_of_the_papers_with_the_scales_that_fit():
    a, b = pair(26)  # the window fits into 26 and 13 pixels
    found, multiscale = ssim(a, b)
    halves = [image.unflatten(2, (13, 2)).unflatten(4, (13, 2)).mean((3, 5)) for image in (a, b)]
    for n in range(2):
        fine = np.mean([by_definition(a[n, c].numpy(), b[n, c].numpy()) for c in range(3)], 0)
        coarse = np.mean([by_definition(halves[0][n, c].numpy(), halves[1][n, c].numpy()) for c in range(3)], 0)
        assert found[n].item() == pytest.approx(fine[0], rel=1e-10)
        first = 0.0448 / (0.0448 + 0.2856)
        assert multiscale[n].item() == pytest.approx(fine[1] ** first * coarse[0] ** (1 - first), rel=1e-10)


@pytest.mark.slow  # torchmetrics takes 17 seconds to import
@pytest.mark.parametrize(("side", "scales"), [(64, 3), (128, 4)])
def test_psnr_ssim_and_ms_ssim_are_those_of_torchmetrics_within_the_margin_that_it_reflects(side, scales):
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a, b = pair(side)
    own = {"data_range": 1.0, "reduction": "none"}
    torch.testing.assert_close(psnr(a, b), peak_signal_noise_ratio(a, b, dim=(1, 2, 3), **own))
    found, multiscale = ssim(a, b)
    weights = torch.tensor([0.0448, 0.2856, 0.3001, 0.2363][:scales], dtype=torch.float64)
    expected, similar = torch.ones(2, dtype=torch.float64), []
    for weight in weights / weights.sum():
        _, everywhere = structural_similarity_index_measure(a, b, return_full_image=True, **own)
        _, contrast = structural_similarity_index_measure(a, b, return_contrast_sensitivity=True, **own)
        similar.append(everywhere[..., 5:-5, 5:-5].flatten(1).mean(1))
        expected *= (similar[-1] if len(similar) == scales else contrast) ** weight
        a, b = (torch.nn.functional.avg_pool2d(image, 2) for image in (a, b))
    torch.testing.assert_close(found, similar[0])
    torch.testing.assert_close(multiscale, expected)


def test_psnr_is_that_of_the_mean_square_and_ends_where_8_bits_do():
    a = torch.full((2, 3, 4, 4), 0.5)
    b = a + torch.tensor([0.1, 0.0])[:, None, None, None]
    assert psnr(a, b).tolist() == pytest.approx([20.0, 10 * np.log10(12 * 255**2)], rel=1e-6)


def test_images_without_room_for_the_window_are_refused():
    with pytest.raises(ValueError, match="11 pixels a side at least"):
        ssim(*pair(10))


def test_a_slice_is_a_projection_and_the_distance_of_a_shifted_set_is_the_shift_along_it():
    from scipy.stats import wasserstein_distance

    points = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([3.0, 0, 0, 0, -4.0, 0], dtype=torch.float64)
    axes = torch.nn.functional.normalize(Noise(0, torch.arange(9)).normal("directions", 6, torch.float64), dim=1)
    found = slices(points, 9)
    assert (slices(points + shift, 9) - found).abs().mean(1).tolist() == pytest.approx((axes @ shift).abs().tolist())
    others = points.square()
    theirs = [wasserstein_distance(points @ axis, others @ axis) for axis in axes]
    assert (slices(others, 9) - found).abs().mean(1).tolist() == pytest.approx(theirs)


def test_a_pyramid_adds_up_and_puts_flat_images_into_its_last_level():
    fine, middle, rest = pyramid(torch.full((1, 3, 64, 64), 0.7, dtype=torch.float64))
    assert (fine.shape[3], middle.shape[3], rest.shape[3]) == (64, 32, 16)
    torch.testing.assert_close(rest, torch.full_like(rest, 0.7))
    assert fine.abs().max() < 1e-14
    assert middle.abs().max() < 1e-14
    wave = torch.cos(torch.arange(64) * torch.pi).expand(1, 1, 64, 64)  # the finest there is
    levels = pyramid(wave)
    torch.testing.assert_close(levels[0], wave)
    assert max(level.abs().max().item() for level in levels[1:]) < 1e-6


def test_patches_are_windows_at_places_of_their_own():
    image = torch.arange(3 * 16 * 16).view(1, 3, 16, 16).expand(2, -1, -1, -1)
    found = patches(image, Noise(0, torch.arange(2)), 200)
    corners = [divmod(patch[0].item(), 16) for patch in found.flatten(0, 1)]
    for patch, (y, x) in zip(found.flatten(0, 1), corners, strict=True):
        assert torch.equal(patch.view(3, PATCH, PATCH), image[0, :, y : y + PATCH, x : x + PATCH])
    assert len(set(corners[:200])) > 60  # of 100 places
    assert corners[:200] != corners[200:]


def test_a_perfect_reconstruction_has_the_best_of_all_measures_and_a_blurred_one_lacks_what_is_fine():
    perfect, blurred = dict(quality.run(identity())), dict(quality.run(identity(blur=True)))
    assert perfect["psnr"] == pytest.approx(58.92, abs=0.01)
    assert (perfect["ssim"], perfect["ms_ssim"]) == pytest.approx((1.0, 1.0))
    for side in (32, 16):
        assert perfect[f"swd_reconstructions_{side}"] == pytest.approx(0.0, abs=1e-9)
        assert perfect[f"swd_samples_{side}"] > 0.1
    assert perfect["swd_samples"] == pytest.approx((perfect["swd_samples_32"] + perfect["swd_samples_16"]) / 2)
    assert blurred["psnr"] < 20
    assert blurred["swd_reconstructions_32"] > 2 * blurred["swd_reconstructions_16"] > 0.1
    assert all(isinstance(value, float) for value in perfect.values())


def test_every_rank_has_the_same_bits_whatever_their_number():
    class Lonely(World):
        """One of several ranks; it sums with nobody."""

        def sum(self, value):
            return value

    one = identity(count=11)

    def of(subject):
        return lambda ids: (held_out(subject, ids), reconstructions(subject, ids), samples(subject, ids))

    whole = together(one, 11, of(one), at_once=3)
    for size in (2, 3, 8):  # of 8 ranks, four have nothing to do
        parts = []
        for rank in range(size):
            subject = identity(count=11, world=Lonely(rank, size))
            subject._codes["valid"] = one.codes()
            parts.append(together(subject, 11, of(subject), at_once=3))
        for rows, *found in zip(whole, *parts, strict=True):
            assert torch.equal(rows, sum(found))
            assert all((part.flatten(1).abs().sum(1) > 0).sum() < len(rows) for part in found)
