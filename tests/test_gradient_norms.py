"""The norm of every player's gradient is that of the whole batch before it is clipped, in the rows that show it."""

import cases
import pytest
from tiny_set import pack_tiny

PLAYERS = ("train/grad_norm_vae", "train/grad_norm_discriminator")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pack_tiny(tmp_path_factory.mktemp("data") / "tiny").directory


def norms(data, run, precision="fp64", **more):
    cases.run("factorvae", data, run, train_steps=1, train_precision=precision, track_every=1, **more)
    (row,) = cases.rows(run)
    return [row[player] for player in PLAYERS]


def test_gradient_norms_depend_on_neither_accumulation_nor_clipping_nor_the_scale_of_the_loss(data, tmp_path):
    whole = norms(data, tmp_path / "whole")
    assert all(norm > 0 for norm in whole)
    assert norms(data, tmp_path / "accumulated", train_accumulate=2) == pytest.approx(whole, rel=1e-9)
    assert norms(data, tmp_path / "clipped", train_clip=1e-3) == whole
    assert norms(data, tmp_path / "scaled", "fp16") == pytest.approx(whole, rel=2**-10)  # float16's own
