"""torch.compile takes every objective whole, FactorVAE in parts, changes no result, compiles once, or says why not."""

import re
import shutil
from copy import deepcopy

import cases
import pytest
import torch
from small import STEP, micro_batches, small, step
from test_world_size import distance

from vaedist import aggregate
from vaedist.config import available
from vaedist.halves import Autocast
from vaedist.noise import Noise
from vaedist.watch import TorchError

# which torch.compile hides, but not where warnings are errors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
compiles = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++, without which inductor has no CPU code")
GRAPHS = 5  # of FactorVAE: the encoder, with gradients and without, the decoder, and the discriminator twice
VARIANTS = [(name, {}) for name in available("vaedist.objectives")] + [
    ("dipvae", {"kind": "ii"}),
    ("constrainedvae", {"constrained": "recon", "bound": 1.0}),
]


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("name", "settings"),
    [pytest.param(*variant, marks=() if variant[0] == "factorvae" else pytest.mark.slow) for variant in VARIANTS],
    ids=str,
)
def test_every_objective_is_one_graph_with_the_terms_and_gradients_of_eager(name, settings):
    """Or FactorVAE's parts; and one more in micro-batches, where these look at the whole step. None compiles anew."""
    looks = small(name).couples_rows and name != "factorvae"  # which looks in any case
    for parts in (1, 2) if looks else (1,):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        eager, compiled = (small(name, "dropout", **settings) for _ in range(2))
        compiled.compile(backend="eager", fullgraph=True)
        assert compiled.state_dict().keys() == eager.state_dict().keys()
        for first in (24, 36, 48):
            micros = micro_batches(eager.streams, parts, first=first)
            assert step(compiled, micros) == step(eager, micros)
            for mine, other in zip(compiled.parameters(), eager.parameters(), strict=True):
                assert torch.equal(mine.grad, other.grad)
        assert graphs() == (GRAPHS if name == "factorvae" else 1)


def test_halves_in_the_place_of_weights_compile_nothing_anew():
    objective = small("factorvae").float()
    objective.compile(backend="eager", fullgraph=True, dynamic=False)
    model = Autocast(objective, half := lambda: torch.autocast("cpu", torch.bfloat16), torch.bfloat16)
    for first in (24, 36, 48):
        ((images, noise),) = micro_batches(2, first=first)
        with torch.no_grad(), half():
            (surveyed,) = objective.survey([(images.float(), noise)], STEP)
        model(images.float(), noise, STEP, surveyed)["loss"].backward()
    assert graphs() == GRAPHS


def test_a_copy_of_a_compiled_objective_has_its_own_weights():
    objective = small("factorvae")
    objective.compile(backend="eager")
    ((images, noise),) = micro_batches(2)
    copy = deepcopy(objective)
    with torch.no_grad():
        for weight in copy.parameters():
            weight.zero_()
    assert not torch.equal(objective._encode(images[0], noise).mu, copy._encode(images[0], noise).mu)
    assert torch.equal(copy._encode(images[0], noise).mu, copy.posterior(images[0], noise).mu)


@compiles
def test_compiled_noise_is_the_same_bit_for_bit():
    """Of a number of columns that does not fill vectors; inductor's own code for the hash gave other bits there."""
    noise = Noise(7, torch.arange(64))
    for draw in (lambda noise: noise.bits("latent", 10), lambda noise: noise.normal("latent", 10)):
        assert torch.equal(draw(noise), torch.compile(draw, fullgraph=True)(noise))


@compiles
@pytest.mark.slow
def test_a_run_compiled_half_way_reaches_the_golden_losses_and_goes_on_without(data, tmp_path):
    """Evaluated with another batch, on images that do not fill it."""
    for steps, compiled in ((4, "false"), (8, "true"), (12, "false")):
        more = {"train_steps": steps, "train_compile": compiled, "evaluate_batch": 5, "evaluate_every": 3}
        cases.run("factorvae", data, tmp_path, train_precision="fp64", **more)
    assert len(cases.rows(tmp_path)) == 12
    assert distance(tmp_path, "factorvae") <= 1e-9
    assert graphs() == GRAPHS


@compiles
def test_no_compiler_is_said_in_one_line(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(TorchError) as caught, torch._inductor.utils.fresh_cache():
        cases.run("vae", data, tmp_path, train_compile="true")
    assert re.match(
        r"step 1: train\.compile: .*no-such-compiler.*; train\.compile=false trains the same", str(caught.value)
    )
    assert "\n" not in str(caught.value)


def test_what_is_not_one_graph_is_refused_with_its_place(data, tmp_path, monkeypatch):
    monkeypatch.setattr(aggregate, "CHUNK", 20)  # pairs in several parts, each computed again in the backward pass
    with pytest.raises(TorchError) as caught:
        cases.run("betatcvae", data, tmp_path, train_compile="true")
    assert re.match(
        r"step 1: train\.compile: Unsupported Tensor\.(backward|requires_grad_)\(\) call, "
        r"at vaedist/aggregate\.py:\d+ in backward; ",
        str(caught.value),
    )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "checkpoints").exists()
