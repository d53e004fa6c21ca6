"""Counter-based noise: statistics, independence, and that a number depends on its own coordinates alone."""

import subprocess
import sys

import pytest
import torch

from vaedist.noise import Noise

POSITIONS = torch.arange(100_000)


def test_a_number_depends_on_seed_purpose_position_and_column_alone():
    whole = Noise(3, torch.arange(64).view(2, 32)).normal("latent", 10)
    assert torch.equal(Noise(3, torch.tensor([37])).normal("latent", 10)[0], whole[1, 5])
    assert torch.equal(Noise(3, torch.arange(32, 64)).normal("latent", 4), whole[1, :, :4])
    others = [Noise(4, POSITIONS), Noise(3, POSITIONS).fork("x"), Noise(3, POSITIONS + 1)]
    assert all((noise.bits("latent", 1) != Noise(3, POSITIONS).bits("latent", 1)).all() for noise in others)


def test_the_first_numbers_are_those_of_every_version():
    assert Noise(0, torch.arange(2)).bits("latent", 2).tolist() == [
        [8408257553082667477, -1073988948906487533],
        [-2793518719826935725, -3916760496215310620],
    ]


def test_normal_deviates_are_standard_and_independent():
    normal = Noise(0, POSITIONS).normal("latent", 8, torch.float64)
    n = len(POSITIONS)
    moments = torch.stack(
        [normal.mean(0), normal.square().mean(0) - 1, normal.pow(3).mean(0), normal.pow(4).mean(0) - 3]
    )
    spread = torch.tensor([1.0, 2.0, 15.0, 96.0]).sqrt()[:, None] / n**0.5  # of each moment's estimate
    assert (moments.abs() < 5 * spread).all()
    between_columns = torch.corrcoef(normal.T) - torch.eye(8)
    between_rows = torch.corrcoef(torch.stack([normal[:-1, 0], normal[1:, 0]]))[0, 1]
    assert between_columns.abs().max() < 5 / n**0.5
    assert between_rows.abs() < 5 / n**0.5


def test_normal_deviates_follow_the_distribution_function():
    """Kolmogorov-Smirnov at the 1e-6 level."""
    ordered = Noise(1, POSITIONS).normal("latent", 1, torch.float64)[:, 0].sort().values
    n = len(ordered)
    distance = (torch.special.ndtr(ordered) - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 2.7 / n**0.5


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_chance_is_true_as_often_as_asked(probability):
    hits = Noise(0, POSITIONS).chance("dropout", 3, probability).double().mean()
    assert (hits - probability).abs() <= 5 * (probability * (1 - probability) / (3 * len(POSITIONS))) ** 0.5


@pytest.mark.slow
def test_the_first_numbers_do_not_import_the_compiler():
    script = "import sys, torch; from vaedist.noise import Noise; Noise(0, torch.arange(2)).normal('latent', 3)"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}; print('torch._dynamo' in sys.modules)"], capture_output=True
    )
    assert done.stdout == b"False\n"
