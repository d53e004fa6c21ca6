"""Our step of Adam is torch's: the kernel on a GPU, and everywhere as triton interprets it."""

import itertools
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import interpreted
from torch import Tensor

from vaedist import adam, optimizer, trust
from vaedist.backend import Backend

SHAPES = (5,), (3, 1000), (2048,), (8, 3, 4, 4), (8, 1, 4, 4)
SCALERS = (None, None), (8.0, 0.0), (8.0, 1.0), (None, 0.0), (None, 1.0)  # what GradScaler says: scale, skipped
SETTINGS = {"lr": 1e-3, "beta2": 0.99, "eps": 1e-8}


def rows(device: str, count: float) -> list[list[Tensor]]:
    """Weights, gradients of many magnitudes, moments and counts of steps."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[Tensor]:
        made = [torch.randn(shape, generator=generator) for shape in SHAPES]
        return [one.to(memory_format=torch.channels_last) if one.ndim == 4 else one for one in made]

    weights, means = draw(), draw()
    slopes = [one * 10.0 ** torch.randint(-6, 3, one.shape, generator=generator) for one in draw()]
    squares, counts = [mean.square() for mean in means], [torch.tensor(count + i) for i in range(len(SHAPES))]
    return [[one.to(device) for one in row] for row in (weights, slopes, means, squares, counts)]


def check(device: str) -> None:
    """Against torch's in float64: at the first step, scaled, clipped (torch has unscaled then), overflowing."""
    for count, beta, decay, (scale, skipped) in itertools.product((1.0, 20_000.0), (0.0, 0.9), (0.0, 0.1), SCALERS):
        numbers = SETTINGS | {"beta1": beta, "weight_decay": decay}
        for name, value in (("grad_scale", scale), ("found_inf", skipped)):
            numbers[name] = None if value is None else torch.full((), value, device=device)
        ours, before = rows(device, count), rows(device, count)
        *theirs, counts = [[one.double() for one in row] for row in before]
        adam.at_once(ours, **numbers)
        adam.fused(*theirs, [], [one.float() for one in counts], amsgrad=False, maximize=False, **numbers)
        for row in (0, 2, 3):
            for one, other, start in zip(ours[row], theirs[row], before[row], strict=True):
                assert one.stride() == start.stride()
                assert float((one - other).norm() / other.norm()) < 2e-7
                assert torch.equal(one, start) == (skipped == 1)


def taken(way: AbstractContextManager[Any], steps: int = 3) -> list[Tensor]:
    """Weights after some steps of a run's optimiser, made in this way."""
    weights = [torch.nn.Parameter(weight) for weight in rows("cpu", 0)[0]]
    made = optimizer.Config(lr=1e-2).build([{"params": weights[:2]}, {"params": weights[2:], "betas": (0.5, 0.9)}])
    for step in range(steps):
        for weight, slope in zip(weights, rows("cpu", 0)[1], strict=True):
            weight.grad = slope * (step + 1)
            if weight.shape[1:2] == (1,):  # of a grey image: as autograd leaves it, a stride where there is no number
                weight.grad = weight.grad.as_strided(weight.shape, (16, 16, 4, 1))
                assert weight.grad.stride() != weight.stride()
        with way:
            made.step()
    return [weight.detach() for weight in weights]


def test_of_a_step_of_adam_the_kernel_makes_what_torchs_would_have_made(monkeypatch):
    calls = []

    def kernel(rows: list[list[Tensor]], **numbers: Any) -> None:
        calls.append(len(rows[0]))
        *four, counts = rows
        adam.fused(*four, [], counts, **({"amsgrad": False, "maximize": False} | numbers))

    monkeypatch.setattr(adam, "at_once", kernel)
    assert all(map(torch.equal, taken(adam.Own()), taken(nullcontext())))
    assert calls == [2, 3] * 3


@pytest.mark.parametrize("fault", ["zeros", "no compiler"])
def test_a_kernel_that_is_wrong_or_does_not_compile_on_one_rank_is_used_by_none(fault, monkeypatch, capsys):
    def kernel(rows: list[list[Tensor]], **_: float) -> None:
        if fault == "no compiler":
            raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(trust, "_tried", {})
    monkeypatch.setattr(adam, "at_once", kernel)
    assert not adam.trusted_on(torch.device("cpu"))
    told = {"zeros": "Adam is off by ", "no compiler": "no compiler\n"}[fault]
    assert f"vaedist: this GPU does without kernels of our own, and is slower: {told}" in capsys.readouterr().err
    for all_ranks in ([True, True], [True, False]):
        monkeypatch.setattr(adam, "trusted_on", lambda device: True)
        world = SimpleNamespace(everyone=lambda own, all_ranks=all_ranks: all_ranks)
        one = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, world=world)
        Backend._choose_adam(one)
        assert isinstance(one._adam, adam.Own) == all(all_ranks)


def test_the_kernel_as_triton_interprets_it():
    assert interpreted(__file__) == (0, "")


@pytest.mark.gpu
def test_the_kernel_on_a_gpu():
    check("cuda")


if __name__ == "__main__":
    check("cpu")
