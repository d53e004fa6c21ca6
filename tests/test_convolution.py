"""Our convolutions are torch's: the kernels on a GPU, and everywhere as triton interprets them."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from vaedist import convolution, noise
from vaedist.convolution import Down, Up

CUDA = torch.cuda.is_available()
LAYERS = [(3, 32, 16), (1, 32, 16), (32, 64, 16)]  # channels, those of the smaller side, the larger side
PRECISION = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # relative error of all numbers together


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def check(device: str, dtypes: list[torch.dtype]) -> None:
    """Two networks at once against two by torch in float64, with all gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    for channels, others, size in LAYERS:
        for op, inputs, outputs, side in (("down", channels, others, size), ("up", others, channels, size // 2)):
            x, w, b = draw(2, 3, inputs, side, side), draw(2, others, channels, 4, 4), draw(2, outputs)
            plain = F.conv2d if op == "down" else F.conv_transpose2d
            exact = [tensor.double().requires_grad_() for tensor in (x, w, b)]
            expected = torch.stack([plain(*row, stride=2, padding=1) for row in zip(*exact, strict=True)])
            slope = draw(*expected.shape)
            slopes = torch.autograd.grad(expected, exact, slope.double())
            for dtype in dtypes:
                ours = [tensor.clone().requires_grad_() for tensor in (x, w, b)]
                found = getattr(torch.ops.vaedist, op)(*ours, dtype)
                assert (found.dtype, found.shape) == (dtype, expected.shape)
                back = torch.autograd.grad(found, ours, slope.to(dtype))
                for one, other in zip((found, *back), (expected, *slopes), strict=True):
                    assert error(one.detach(), other.detach()) < PRECISION[dtype], (op, channels, dtype)


def check_replicas(device: str) -> None:
    """vmap over networks gives each what it gives alone."""
    network = nn.Sequential(Down(3, 32), nn.ReLU(), Down(32, 24), nn.ReLU(), Up(24, 32), nn.ReLU(), Up(32, 3))
    network.to(device)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: (0.1 * torch.randn(3, *weight.shape, generator=generator)).to(device).requires_grad_()
        for name, weight in network.named_parameters()
    }
    images = torch.randn(3, 2, 3, 8, 8, generator=generator).to(device)

    def loss(own: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(network, own, (image,)).square().mean()

    alone = [loss({name: weight[k] for name, weight in weights.items()}, images[k]) for k in range(3)]
    expected = torch.autograd.grad(torch.stack(alone).sum(), list(weights.values()))
    together = torch.vmap(loss)(weights, images)
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=0)
    for one, other in zip(torch.autograd.grad(together.sum(), list(weights.values())), expected, strict=True):
        assert error(one, other.double()) < 1e-5


def check_hash(device: str) -> None:
    positions = torch.tensor([[0, 1, 2**40], [5, 7, 2**62]])
    for seed in range(3):
        key = noise.signed(noise.fork(seed, "purpose"))
        found = kernels().hashed(positions.to(device), key, 700, noise.GOLDEN, noise.MIX1, noise.MIX2)
        assert torch.equal(found.cpu(), noise.hashed(positions, key, 700))


def kernels():
    from vaedist import kernels  # which decides at its import whether triton compiles or interprets

    return kernels


def test_kernels_that_are_wrong_or_do_not_compile_give_way_to_cudnn(monkeypatch, capsys):
    x, w, b = torch.randn(2, 2, 3, 8, 8), torch.randn(2, 32, 3, 4, 4), torch.randn(2, 32)
    expected = torch.stack([F.conv2d(*row, stride=2, padding=1) for row in zip(x, w, b, strict=True)])
    wrong = SimpleNamespace(**{name: lambda x, y, *_: x.new_zeros(1) for name in ("down", "up", "weight")})
    for kernels, why in (
        (wrong, "`weight` of 3 and 32 channels is off by 1.0e+00 in torch.float32"),
        (None, "no attr"),
    ):
        convolution._right.cache_clear()
        monkeypatch.setattr(convolution, "_kernels", lambda kernels=kernels: kernels)
        for _ in range(2):
            assert torch.equal(torch.ops.vaedist.down(x, w, b, torch.float32), expected)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("vaedist: convolutions are cuDNN's, which are slower, since ours fail here: ")
        assert why in line
    convolution._right.cache_clear()


def test_the_kernels_as_triton_interprets_them():
    words = [sys.executable, __file__]
    done = subprocess.run(words, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_the_kernels_on_a_gpu():
    check("cuda", list(PRECISION))
    check_replicas("cuda")
    check_hash("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_noise_has_the_same_bits_on_a_gpu():
    made = noise.Noise(3, torch.arange(1000))
    there = noise.Noise(3, torch.arange(1000, device="cuda"))
    assert torch.equal(made.bits("purpose", 10), there.bits("purpose", 10).cpu())
    assert torch.equal(made.normal("purpose", 10), there.normal("purpose", 10).cpu())


if __name__ == "__main__":
    convolution._on_gpu = lambda x: True
    check_replicas("cpu")
    check_hash("cpu")
