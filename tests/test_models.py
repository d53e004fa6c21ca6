"""Every network, found by its file, keeps the contract of `VAE`; the layers against torch's own."""

import pytest
import torch
from torch import nn

from vaedist.config import ConfigError, available
from vaedist.layers import BatchNorm2d, Dropout
from vaedist.models import VAE
from vaedist.noise import Noise
from vaedist.world import World

SIZES = {"conv128": 128}
MODELS = available("vaedist.models")


def build(name: str, **settings) -> VAE:
    from importlib import import_module

    size = SIZES.get(name, 64)
    torch.manual_seed(0)
    return import_module(f"vaedist.models.{name}").Config(**settings).build((3, size, size), World())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_encodes_and_decodes_in_the_shapes_it_promises(name):
    vae = build(name, latent=7)
    images = torch.rand(2, 3, SIZES.get(name, 64), SIZES.get(name, 64))
    noise = Noise(0, torch.arange(2))
    mu, logvar = vae.encode(images, noise)
    assert mu.shape == logvar.shape == (2, 7)
    assert vae.latent == 7
    decoded = vae.decode(mu, noise)
    assert decoded.shape == images.shape
    low, high = vae.pixel_range
    assert low != -1 or (decoded.min() >= low and decoded.max() <= high)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_refuses_images_of_another_size(name):
    from importlib import import_module

    with pytest.raises(ConfigError, match=rf"model.name={name} reads .* data.size=32: set data.size="):
        import_module(f"vaedist.models.{name}").Config().build((3, 32, 32), World())


def test_the_networks_have_the_sizes_of_their_papers():
    count = {name: sum(p.numel() for p in build(name).parameters()) for name in ("conv64", "burgess64")}
    encoder = (3 * 32 + 32 * 32 + 32 * 64 + 64 * 64) * 16 + 192 + 1024 * 256 + 256 + 256 * 20 + 20
    decoder = (3 * 32 + 32 * 32 + 32 * 64 + 64 * 64) * 16 + 131 + 256 * 1024 + 1024 + 10 * 256 + 256
    assert count["conv64"] == encoder + decoder
    convolutions = (3 * 32 + 3 * 32 * 32) * 16
    encoder = convolutions + 4 * 32 + 512 * 256 + 256 + 256 * 256 + 256 + 256 * 20 + 20
    decoder = convolutions + 3 * 32 + 3 + 256 * 512 + 512 + 256 * 256 + 256 + 10 * 256 + 256
    assert count["burgess64"] == encoder + decoder


def test_conv128_is_laid_out_as_described():
    vae = build("conv128")
    convolutions = [layer for layer in vae.modules() if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)]
    assert [layer.in_channels for layer in convolutions] == [3, 32, 64, 128, 256, 128, 64, 32]
    assert all(layer.kernel_size == (4, 4) and layer.stride == (2, 2) for layer in convolutions)
    assert [layer.probability for layer in vae.modules() if isinstance(layer, Dropout)] == [0.2, 0.3, 0.3, 0.2]
    assert [len(layer.weight) for layer in vae.modules() if isinstance(layer, BatchNorm2d)] == [64, 128, 128, 64]
    linear = [(layer.in_features, layer.out_features) for layer in vae.modules() if isinstance(layer, nn.Linear)]
    assert linear == [(16384, 4096), (4096, 64), (32, 4096), (4096, 16384)]
    assert vae.pixel_range == (-1.0, 1.0)
    assert vae.couples_rows
    assert not build("conv64").couples_rows


def test_every_dropout_of_a_model_has_a_name_of_its_own():
    for name in MODELS:
        names = [layer.name for layer in build(name).modules() if isinstance(layer, Dropout)]
        assert len(set(names)) == len(names)


def test_batch_normalisation_is_torchs_on_one_process():
    torch.manual_seed(0)
    ours, theirs = BatchNorm2d(5, World()).double(), nn.BatchNorm2d(5).double()
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for _ in range(3):
        x = torch.randn(4, 5, 6, 6, dtype=torch.float64)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        target = torch.randn_like(x)
        (ours(a) * target).sum().backward()
        (theirs(b) * target).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-10, atol=1e-12)


def test_a_look_without_gradient_leaves_the_running_averages_alone():
    layer = BatchNorm2d(5, World())
    with torch.no_grad():
        layer(torch.randn(4, 5, 6, 6))
    assert torch.equal(layer.running_mean, torch.zeros(5))
    assert torch.equal(layer.running_var, torch.ones(5))


def test_a_dropout_mask_belongs_to_the_sample():
    layer, x = Dropout(0.3, "a"), torch.ones(8, 4, 5, 5)
    whole = layer(x, Noise(0, torch.arange(8)))
    assert torch.equal(whole[3:5], layer(x[3:5], Noise(0, torch.arange(3, 5))))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, Dropout(0.3, "b")(x, Noise(0, torch.arange(8))))
    assert set(whole.unique().tolist()) == {0.0, (x / 0.7)[0, 0, 0, 0].item()}
    assert torch.equal(layer.eval()(x, Noise(0, torch.arange(8))), x)


def test_dropout_keeps_the_mean():
    x = torch.ones(100, 32, 32)
    dropped = Dropout(0.2, "a")(x, Noise(0, torch.arange(100)))
    assert abs(dropped.double().mean() - 1) < 5 * (0.2 / 0.8 / x.numel()) ** 0.5
