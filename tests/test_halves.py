"""Weights are rounded as torch does: by the kernel on a GPU, and everywhere as triton interprets it."""

from types import SimpleNamespace

import pytest
import torch
from launching import interpreted
from torch import Tensor

import vaedist
from vaedist import halves, trust

SHAPES = [(5,), (3, 1000), (8, 3, 4, 4), (2, 1, 4, 4)] * 20  # more than one launch takes


def check(device: str) -> None:
    """Of many magnitudes, subnormal ones of float16 among them."""
    from vaedist import kernels

    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(s, generator=generator) * 10.0 ** torch.randint(-9, 4, s, generator=generator) for s in SHAPES]
    weights = [one.to(device, memory_format=torch.channels_last) if one.ndim == 4 else one.to(device) for one in made]
    for dtype in (torch.bfloat16, torch.float16):
        given = weights
        if device == "cpu" and dtype == torch.bfloat16:  # which the interpreter cuts off, where a GPU rounds
            given = [one.to(dtype).float() for one in weights]
        halves = [torch.empty_like(one, dtype=dtype) for one in given]
        wide = [torch.empty_like(one) for one in given]
        kernels.copy(halves, given)
        kernels.copy(wide, halves)
        assert all(map(torch.equal, halves, (one.to(dtype) for one in given)))
        assert all(map(torch.equal, wide, (one.to(dtype).float() for one in given)))


def test_the_kernel_as_triton_interprets_it():
    assert interpreted(__file__) == (0, "")


@pytest.mark.gpu
def test_the_kernel_on_a_gpu():
    check("cuda")
    assert halves._trial(torch.device("cuda")) == ""


def test_a_kernel_that_is_wrong_gives_way_to_torchs(monkeypatch, capsys):
    def copy(targets: list[Tensor], sources: list[Tensor]) -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source * 1.01)

    monkeypatch.setattr(trust, "_tried", {})
    monkeypatch.setattr(vaedist, "kernels", SimpleNamespace(copy=copy), raising=False)
    assert not trust.trusted("halves", lambda: halves._trial(torch.device("cpu")))
    assert "and is slower: weights are not rounded to torch.bfloat16 as torch does\n" in capsys.readouterr().err


if __name__ == "__main__":
    check("cpu")
