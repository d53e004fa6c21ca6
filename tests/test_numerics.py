"""Half precision follows single precision, and what goes wrong on one rank ends all of them by name."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cases
import faults
import pytest
import tiny_model
import torch
from launching import complaints, launch
from torch.utils._python_dispatch import TorchDispatchMode

from vaedist import backend
from vaedist.debug import DivergedError, DriftError, compare_replicas, digest
from vaedist.halves import Autocast
from vaedist.noise import Noise
from vaedist.objectives import Objective
from vaedist.recipe import load
from vaedist.world import World

# The loss of 12 steps differs by a twentieth of one rounding (2^-9 with 8 bits, 2^-12 with 11): a mean over 12,288
# pixels rounds in all directions. Measured: at most 2.3e-5 in bf16, 6e-6 in fp16.
BAND = {"bf16": 2.0**-9 / 20, "fp16": 2.0**-12 / 20}
GENTLE = {
    "annealedvae": {"objective_gamma": 10},  # 1000 magnifies the differences of a kl by as much
    "constrainedvae-recon": {
        "objective_bound": 0,
        "objective_rate": "1e-9",
    },  # else near 0
    "qlae": {"optimizer_lr": "1e-4"},  # else another rounding is another code, and the run another one
}


# Half precision


class Results(TorchDispatchMode):
    """The types of floating-point results inside the layers of a module, and outside: type -> operations."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.inside: dict[torch.dtype, list[str]] = {}
        self.outside: dict[torch.dtype, list[str]] = {}
        self.depth = 0
        for layer in module.modules():
            if not list(layer.children()):
                layer.register_forward_pre_hook(lambda *_: self.move(1))
                layer.register_forward_hook(lambda *_: self.move(-1))

    def move(self, by: int) -> None:
        self.depth += by

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function.is_view or function is torch.ops.aten.clone.default:  # another layout in memory, the same numbers
            return result
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                (self.inside if self.depth else self.outside).setdefault(tensor.dtype, []).append(str(function))
        return result


@pytest.mark.parametrize("half", backend.HALF.values(), ids=backend.HALF)
@pytest.mark.parametrize("case", cases.TINY)
def test_nothing_but_the_layers_computes_in_half_precision(case, half, data, tmp_path):
    """Posterior, KL, logsumexp, covariance, kernel, cross-entropy, likelihood, survey and decomposition are float32."""
    recipe, _ = load(cases.words(case, data, tmp_path))
    objective = recipe.objective.build(tiny_model.Config().build((3, 64, 64), World()), World(), 50)
    results = Results(objective)
    rows = range(0, 6, 3)
    micros = [(torch.rand(objective.streams, 3, 3, 64, 64), Noise(7, torch.arange(i, i + 3))) for i in rows]
    with results, torch.autocast("cpu", dtype=half):
        for taken in (micros[:1], micros):  # the second with the regularizer's gradient, before the micro-batches
            with torch.no_grad():
                surveyed = objective.survey(taken, torch.zeros(()))
                objective.latents(taken)
            for (images, noise), survey in zip(taken, surveyed, strict=True):
                terms = objective(images, noise, torch.zeros(()), survey)
                assert {term.dtype for term in terms.values()} == {torch.float32}
    assert half in results.inside
    assert half not in results.outside, results.outside[half]


@pytest.mark.parametrize("half", backend.HALF.values(), ids=backend.HALF)
@pytest.mark.parametrize("case", cases.TINY)
def test_weights_rounded_at_once_give_the_bits_of_autocast(case, half, data, tmp_path):
    recipe, _ = load(cases.words(case, data, tmp_path))
    images, noise = torch.rand(2, 3, 3, 64, 64), Noise(7, torch.arange(3))
    found = []
    for at_once in (half, None):
        torch.manual_seed(0)
        objective = recipe.objective.build(tiny_model.Config().build((3, 64, 64), World()), World(), 50)
        autocast = partial(torch.autocast, "cpu", dtype=half)
        with torch.no_grad(), autocast():
            (survey,) = objective.survey([(images[: objective.streams], noise)], torch.zeros(()))
        terms = Autocast(objective, autocast, at_once)(images[: objective.streams], noise, torch.zeros(()), survey)
        terms["loss"].backward()
        found.append([*terms.values(), *(weight.grad for weight in objective.parameters() if weight.grad is not None)])
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("half", backend.HALF.values(), ids=backend.HALF)
def test_what_a_network_says_of_a_posterior_is_not_rounded_to_half_precision(half, data, tmp_path):
    recipe, _ = load(cases.words("factorvae", data, tmp_path))
    objective = recipe.objective.build(tiny_model.Config().build((3, 64, 64), World()), World(), 50)
    with torch.autocast("cpu", dtype=half):
        mu, logvar = objective.vae.encode(torch.rand(4, 3, 64, 64), Noise(0, torch.arange(4)))
        logits = objective.discriminator(mu)
    assert all(x.dtype == torch.float32 and not torch.equal(x, x.to(half).float()) for x in (mu, logvar, logits))


@pytest.fixture(scope="module")
def fp32(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("fp32")
    for case in cases.TINY:
        cases.run(case, data, out / case, **GENTLE.get(case, {}))
    return out


@pytest.mark.parametrize("precision", backend.HALF)
@pytest.mark.parametrize("case", cases.TINY)
def test_a_run_in_half_precision_follows_the_one_in_fp32(case, precision, data, fp32, tmp_path):
    cases.run(case, data, tmp_path, train_precision=precision, **GENTLE.get(case, {}))
    assert 0 < band(tmp_path, fp32 / case) <= BAND[precision]


@pytest.mark.parametrize("precision", backend.HALF)
def test_it_follows_in_micro_batches_too(precision, data, fp32, tmp_path):
    cases.run("betatcvae", data, tmp_path, train_precision=precision, train_accumulate=4)
    assert 0 < band(tmp_path, fp32 / "betatcvae") <= BAND[precision]


def test_a_run_in_fp16_goes_on_bit_for_bit_with_the_scale_it_had(data, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "STEADY", 4)  # one growth before the restart, one after it
    for directory, stops in (("whole", [12]), ("stopped", [6, 12])):
        for steps in stops:
            cases.run("factorvae", data, tmp_path / directory, train_precision="fp16", train_steps=steps)
    whole, stopped = (tmp_path / directory for directory in ("whole", "stopped"))
    assert cases.terms(whole) == cases.terms(stopped)
    assert cases.terms(whole)["train/loss_scale"] == [1] * 3 + [2] * 4 + [4] * 4 + [8]
    assert scaling(whole, 6) == {"loss_scale": 2, "steady": 2}
    for name in ("weights.safetensors", "optimizer.safetensors"):
        files = [directory / "checkpoints" / "step-00000012" / name for directory in (whole, stopped)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_goes_on_in_another_precision_and_comes_back(data, tmp_path):
    for steps, precision in ((4, "fp16"), (8, "fp32"), (12, "fp16")):
        cases.run("vae", data, tmp_path, train_precision=precision, train_steps=steps)
    assert len(cases.rows(tmp_path)) == 12
    assert scaling(tmp_path, 8) == {}
    assert scaling(tmp_path, 12) == {"loss_scale": 1, "steady": 4}


def test_gradients_that_overflow_at_any_scale_end_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(backend, "LAST_SCALE", 2.0**-2)
    recon = Objective.recon
    monkeypatch.setattr(Objective, "recon", lambda *arguments: recon(*arguments) * 1e9)
    with pytest.raises(DivergedError, match=r"^step 3: loss_scale=0\.125, and the gradients still overflow float16"):
        cases.run("vae", data, tmp_path, train_precision="fp16")


def scaling(run: Path, step: int) -> dict[str, float]:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())["scaling"]


def band(directory: Path, reference: Path) -> float:
    """The largest relative difference of the loss in any step."""
    found, expected = (cases.terms(path)["train/loss"] for path in (directory, reference))
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


# One rank alone


PROCESSES = 4


@pytest.fixture(scope="module")
def launched(data, tmp_path_factory) -> tuple[Path, dict]:
    """What faults.py found: the directory of its runs, and every rank's end."""
    out = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "STEADY", faults.STEADY)
        cases.run("betatcvae", data, out / "moved", train_precision="fp16", train_steps=5)
    done = launch(data, out, processes=PROCESSES, script=Path(faults.__file__))
    assert (out / "found.json").exists(), done.stderr[-3000:]
    found = json.loads((out / "found.json").read_text())
    assert found["world_size"] == PROCESSES
    return out, found["faults"] | {"launched": (done.returncode, complaints(done.stderr))}


@pytest.mark.parametrize(
    ("fault", "line", "steps"),
    [
        ("latents", "DivergedError: step 4: loss=nan, recon=nan, kl=nan; nothing of this step was saved", 5),
        ("term", "DivergedError: step 4: kl=nan; ", 5),
        ("report", "DivergedError: step 4: latent/mi=nan, latent/tc=nan, latent/dwkl=nan; ", 4),
        ("gradient", "DivergedError: step 4: vae.encoder.0.weight=nan, ", 4),
        ("ulp", "DriftError: step 5: discriminator.0.weight of rank {last} is not that of rank 0: the {size} ", 5),
    ],
)
def test_what_goes_wrong_on_one_rank_ends_all_within_an_interval_by_name_and_unsaved(fault, line, steps, launched):
    _, found = launched
    errors, taken, saved = zip(*found[fault], strict=True)
    assert len(set(errors)) == 1
    assert errors[0].startswith(line.format(size=PROCESSES, last=PROCESSES - 1))
    assert taken == (steps,) * PROCESSES
    assert not any(saved)


def test_an_overflow_on_one_rank_skips_the_step_on_all_and_is_logged(launched):
    """The replicas are compared in every step; the weights and moments stay, the clock and the scale move."""
    out, found = launched
    assert [error for error, *_ in found["overflow"]] == [""] * PROCESSES
    run, step = out / "overflow", faults.STEP
    rows = cases.rows(run)
    assert [row["train/skipped_steps"] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert [row["train/loss_scale"] for row in rows] == [1, 1, 2, 1, 1, 1, 2, 2]
    assert [row["seen"] for row in rows] == [cases.BATCH * number for number in range(1, 9)]
    assert scaling(run, step) == {"loss_scale": 1, "steady": 0}
    for name in ("weights.safetensors", "optimizer.safetensors"):
        before, at, after = (run / "checkpoints" / f"step-{k:08d}" / name for k in (step - 1, step, step + 1))
        assert before.read_bytes() == at.read_bytes() != after.read_bytes()


def test_half_precision_is_the_same_on_several_processes(launched, data, fp32, tmp_path):
    """And follows fp32 there as well; the scale, and what a checkpoint keeps of it, know nothing of their number."""
    out, _ = launched
    for precision in backend.HALF:
        assert band(out / f"betatcvae-{precision}", fp32 / "betatcvae") <= BAND[precision]
    assert len(cases.rows(out / "moved")) == 12  # stopped on one process
    assert band(out / "moved", fp32 / "betatcvae") <= BAND["fp16"]
    assert scaling(out / "moved", 12) == scaling(out / "betatcvae-fp16", 12) == {"loss_scale": 16, "steady": 0}


def test_the_command_then_fails_with_the_one_line_and_leaves_no_checkpoint(launched):
    out, found = launched
    status, lines = found["launched"]
    assert status != 0
    (said,) = lines
    assert said.startswith("vaedist: step 4: loss=nan, recon=nan, kl=nan; nothing of this step was saved")
    assert (out / "launched" / "recipe.yaml").exists()
    assert not (out / "launched" / "checkpoints").exists()


# The digest of a replica


def test_a_digest_sees_every_number_its_place_and_its_sign():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool):
        tensor = torch.arange(6).reshape(2, 3).to(dtype)
        assert digest(tensor) == digest(tensor.clone()) == digest(tensor.T.contiguous().T)
    tensor = torch.arange(6.0)
    digests = [int(digest(tensor)), int(digest(tensor.flip(0))), int(digest(torch.cat([tensor, tensor[:1]])))]
    digests += [int(digest(torch.zeros(6))), int(digest(-torch.zeros(6))), int(digest(torch.zeros(0)))]
    for place in range(6):
        changed = tensor.clone()
        changed.view(torch.int32)[place] ^= 1
        digests.append(int(digest(changed)))
    assert len(set(digests)) == len(digests)


@dataclass(frozen=True)
class Others(World):
    """Ranks whose copies of a Linear layer's (weight, bias, running) are those of rank 0 but for some."""

    size: int = 4
    odd: tuple[tuple[int, int], ...] = ()  # rank, tensor

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        everyone = rows.repeat(self.size, 1)
        for rank, number in self.odd:
            everyone[rank, number] += 1 + rank
        return everyone


@pytest.mark.parametrize(
    ("odd", "size", "line"),
    [
        (((1, 1), (1, 2)), 2, "step 7: bias of rank 1 is not that of rank 0: the 2 processes no longer"),
        (((0, 2),), 4, "step 7: running of rank 0 is not that of rank 1: the 4 processes no longer"),
        (((1, 0), (3, 0)), 4, "step 7: weight of rank 1, 3 is not that of rank 0: "),
    ],
)
def test_the_first_tensor_that_differs_is_named_with_the_ranks_that_are_alone_with_it(odd, size, line):
    model = torch.nn.Linear(2, 2)
    model.register_buffer("running", torch.zeros(2), persistent=False)
    with pytest.raises(DriftError, match=f"^{line}"):
        compare_replicas(7, model, Others(size=size, odd=odd))
    compare_replicas(7, model, Others(size=size))
    compare_replicas(7, model, World())
