"""A replayed step is the step: on a GPU runs have the same numbers with `train.capture` and without."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import cases
import pytest
import small
import torch
from safetensors.torch import load_file
from torch import Tensor

from vaedist import branch
from vaedist.data.stream import Batch
from vaedist.graph import WARM, Replayed
from vaedist.objectives.vae import ELBO
from vaedist.train import main
from vaedist.world import World

STEPS = 200
RUNS: dict[str, dict[str, object]] = {case: {"case": case} for case in cases.CASES if case != "conv64"} | {
    "fp64": {"train_precision": "fp64"},
    "bf16": {"train_precision": "bf16"},
    "fp16": {"train_precision": "fp16", "train_clip": 100},
    "tf32": {"train_tf32": "true"},
    "compiled": {"train_compile": "true", "train_precision": "bf16"},
    "clipped, averaged and accumulated": {"train_clip": 50, "train_ema": 0.9, "train_accumulate": 2},
    "deterministic": {"debug_deterministic": "true"},
    "from the memory of the host": {"data_store": "host"},
}


class Again:
    """Stands for a CUDA graph, which takes a GPU: `replay` computes again what was captured, into the same memory."""

    def __init__(self, replayed: list[Replayed]) -> None:
        self.replayed = replayed

    def replay(self) -> None:
        (one,) = self.replayed
        found, _ = one._take(one._batch, one._done, False)
        for name, term in found.items():
            one._terms[name].copy_(term)


def backend(**more: object) -> SimpleNamespace:
    settings = {"captures": True, "uncapturable": "", "dtype": torch.float32, "device": torch.device("cpu")}
    settings["world"] = World()
    return SimpleNamespace(capturing=torch.no_grad, branching=torch.no_grad, **settings | more)


def stand_in(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """For what torch.cuda has only with a GPU; a step takes no memory, and so much is free."""
    for name, value in (("CUDAGraph", None), ("current_stream", None), ("max_memory_allocated", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 0))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: torch.no_grad())


def steps(replayed: Replayed, measured: set[int]) -> list[tuple[float, bool]]:
    """The loss of each of ten steps, and whether latents came with it."""
    found = []
    for step in range(10):
        batch = Batch(torch.full((1, 1, 2), step), torch.full((1, 2), 10 * step))
        terms, latents = replayed(batch, step, step in measured)
        found.append((terms["loss"].item(), bool(latents)))
    return found


def test_a_replay_takes_the_images_and_the_count_of_its_own_step(monkeypatch):
    taken: list[bool] = []
    made: list[Replayed] = []

    def take(batch: Batch, done: Tensor, measured: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        taken.append(measured)
        loss = batch.rows.sum() + batch.positions.sum() + 1000 * done
        return {"loss": loss.clone()}, {"kl": loss} if measured else {}

    lines: list[str] = []
    eager = steps(Replayed(take, backend(captures=False), lines.append), measured={1, 6})
    assert eager == [(1022.0 * step, step in {1, 6}) for step in range(10)]
    taken.clear()
    stand_in(monkeypatch, free=0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Again(made))
    made.append(Replayed(take, backend(), lines.append))
    assert steps(made[0], measured={1, 6}) == eager
    assert taken.count(True) == 2
    assert len(taken) == 10 + 1, "captured once"
    assert lines == []


@pytest.mark.parametrize("why", ["the processes share gradients by gloo, on the CPU", ""])
def test_what_cannot_be_captured_is_said_once_and_taken_as_it_is_written(why, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more lines")

    stand_in(monkeypatch, free=0)
    taken, lines = [], []
    replayed = Replayed(lambda *step: taken.append(step) or ({"loss": torch.zeros(())}, {}), backend(uncapturable=why),
                        lines.append)  # fmt: skip
    monkeypatch.setattr(torch.cuda, "graph", broken)
    steps(replayed, measured=set())
    assert len(taken) == 10
    (line,) = lines
    told = why or "operation not permitted when stream is capturing"
    assert line == f"steps are launched kernel by kernel, not as one CUDA graph: {told}"
    assert WARM < 10


def test_a_graph_that_leaves_no_memory_for_other_steps_is_given_up(monkeypatch):
    stand_in(monkeypatch, free=-1)
    lines: list[str] = []
    replayed = Replayed(lambda *step: ({"loss": torch.zeros(())}, {}), backend(), lines.append)
    steps(replayed, measured=set())
    (line,) = lines
    assert line.endswith("there is no memory for both, and some steps and evaluations are not in the graph")


class Order:
    """Stands for a stream of a GPU: who is current, and what waits for what."""

    def __init__(self) -> None:
        self.current, self.waits = "rest", []

    def stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.waits.append((name, other.name)))

    @contextmanager
    def enter(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before


def test_the_players_of_factorvae_are_beside_the_rest_and_waited_for(monkeypatch):
    """The second batch and the discriminator; what one branch reads of the other is kept until both have ended."""
    order, where = Order(), []
    monkeypatch.setattr(torch.cuda, "stream", order.enter)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: order.stream(order.current))
    objective, micros = small.small("factorvae"), small.micro_batches(2)
    expected = small.step(objective, micros)
    gradients = [weight.grad.clone() for weight in objective.parameters()]
    networks = {"encoder": objective.vae.encoder, "decoder": objective.vae.decoder, "critic": objective.discriminator}
    for name, network in networks.items():
        network.register_forward_hook(lambda *_, name=name: where.append((name, order.current)))
    with branch.branching(order.stream("branch")):
        assert small.step(objective, micros) == expected
        held = list(branch._branch.held)
    latents, forward = ("encoder", "rest"), ("encoder", "rest")
    assert where == [("encoder", "branch"), latents, forward, *[("critic", "branch")] * 2, ("decoder", "rest")]
    assert order.waits == [("branch", "rest"), ("branch", "rest"), ("rest", "branch"), ("rest", "branch")]
    assert all(torch.equal(weight.grad, one) for weight, one in zip(objective.parameters(), gradients, strict=True))
    ((second,), _), ((z, permuted), terms) = held
    assert second is micros
    assert z.shape == permuted.shape
    assert [term.item() for term in terms] == [
        expected[name] for name in ("discriminator", "discriminator_accuracy", "tc")
    ]
    assert branch._branch is None


@pytest.mark.parametrize("asked", [True, False])
def test_a_step_that_breaks_off_leaves_no_branch(asked, monkeypatch):
    order = Order()
    monkeypatch.setattr(torch.cuda, "stream", order.enter)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: order.stream(order.current))

    def broken() -> None:
        if asked:
            branch.beside(lambda: 3)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), branch.branching(order.stream("branch")):
        broken()
    assert order.waits == ([("branch", "rest"), ("rest", "branch")] if asked else [])
    assert branch.beside(lambda: order.current).result() == "rest"


def trained(
    data: Path, run: Path, case: str = "factorvae", **more: object
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """The rows of a run but for its speed, and its last weights."""
    settings = {"train_steps": STEPS, "track_every": 50, "checkpoint_every": STEPS, "evaluate_every": STEPS} | more
    assert main(cases.words(case, data, run, **settings)) == 0
    rows = [{name: value for name, value in row.items() if "perf/" not in name} for row in cases.rows(run)]
    (weights,) = run.glob(f"checkpoints/*{settings['train_steps']}/weights.safetensors")
    return rows, load_file(weights)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # see test_compile
@pytest.mark.parametrize("case", RUNS)
def test_captured_and_eager_runs_have_the_same_numbers(case, data, tmp_path, capsys):
    rows, weights = trained(data, tmp_path / "captured", **RUNS[case])
    assert "kernel by kernel" not in capsys.readouterr().out
    eager_rows, eager_weights = trained(data, tmp_path / "eager", train_capture="false", **RUNS[case])
    assert rows == eager_rows
    assert all(torch.equal(weights[name], eager_weights[name]) for name in eager_weights)


@pytest.mark.gpu
def test_a_captured_run_goes_on_bit_for_bit(data, tmp_path):
    rows, weights = trained(data, tmp_path / "whole")
    trained(data, tmp_path / "halves", train_steps=STEPS // 2)
    resumed_rows, resumed_weights = trained(data, tmp_path / "halves")
    assert rows[-1] == resumed_rows[-1]
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


@pytest.mark.gpu
def test_captured_replicas_have_the_numbers_of_eager_ones(data, tmp_path, capsys):
    found = []
    settings = {"train_steps": 60, "track_every": 20, "checkpoint_every": 60}
    for capture in ("true", "false"):
        runs = [tmp_path / f"{capture}-{number}" for number in range(3)]
        words = cases.words("factorvae", data, f"[{','.join(map(str, runs))}]", **settings, train_capture=capture)
        assert main([*words, "train.replicas=3", "objective.gamma=[1,10,100]"]) == 0
        found.append([load_file(*run.glob("checkpoints/*60/weights.safetensors")) for run in runs])
    assert "kernel by kernel" not in capsys.readouterr().out
    assert all(torch.equal(one[name], other[name]) for one, other in zip(*found, strict=True) for name in one)


@pytest.mark.gpu
def test_replicas_are_the_runs_alone_on_a_gpu_too(data, tmp_path):
    settings = {"train_steps": 20, "track_every": 10, "train_capture": "false"}
    runs, gammas = [tmp_path / str(number) for number in range(3)], (1, 10, 100)
    words = cases.words("factorvae", data, f"[{','.join(map(str, runs))}]", **settings)
    assert main([*words, "train.replicas=3", f"objective.gamma={list(gammas)}".replace(" ", "")]) == 0
    for number, (run, gamma) in enumerate(zip(runs, gammas, strict=True)):
        alone = cases.words("factorvae", data, tmp_path / f"alone-{number}", **settings)
        assert main([*alone, f"seed={number}", f"objective.gamma={gamma}"]) == 0
        losses = [[row["train/loss"] for row in cases.rows(one)] for one in (run, tmp_path / f"alone-{number}")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_objective_that_reads_a_number_is_trained_eagerly(accumulate, data, tmp_path, capsys, monkeypatch):
    more = {"case": "vae", "train_accumulate": accumulate, "train_precision": "fp16"}
    expected = trained(data, tmp_path / "eager", train_capture="false", **more)
    regularizer = ELBO.regularizer

    def reading(self: ELBO, *rest: object) -> dict[str, Tensor]:
        found = regularizer(self, *rest)
        assert found["regularizer"].item() >= 0
        return found

    monkeypatch.setattr(ELBO, "regularizer", reading)
    capsys.readouterr()
    rows, weights = trained(data, tmp_path / "reading", **more)
    assert capsys.readouterr().out.count("not as one CUDA graph: ") == 1
    assert rows == expected[0]
    assert all(torch.equal(weights[name], expected[1][name]) for name in weights)


NCCL = """
import json, sys
import cases, torch
from pathlib import Path
from vaedist import backend, trainer
from vaedist.world import World

class Two(World):       # whose collectives NCCL takes, from one process
    def everyone(self, value):
        return [value]

    def step_rows(self, rows):  # a gather brings what is there: the other one's are the same
        return super().step_rows(rows).repeat(2, 1)

made = backend.Backend.__init__
def among_two(self, config):
    made(self, config)
    self.world = Two(0, 2)
backend.Backend.__init__ = among_two
trainer.compare_replicas = lambda *_: None
words = json.loads(sys.argv[1])
from vaedist.train import main
sys.exit(main(words))
"""


@pytest.mark.gpu
@pytest.mark.parametrize("objective", ["vae", "factorvae", "betatcvae", "constrainedvae"])
def test_nccl_is_captured_with_the_step(objective, data, tmp_path):
    """Two processes cannot share a GPU by NCCL: one takes all collectives of two, and divides by two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    found = []
    for capture in ("true", "false"):
        run, more = tmp_path / capture, {"train_steps": STEPS, "track_every": 50, "train_capture": capture}
        words = cases.words(objective, data, run, checkpoint_every=STEPS, **more, evaluate_names="[]")
        environment = os.environ | {name: str(value) for name, value in alone.items()} | {"MASTER_PORT": port}
        done = subprocess.run(
            [sys.executable, "-c", NCCL, json.dumps(words)],
            env=environment, cwd=Path(__file__).parent, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        assert "kernel by kernel" not in done.stdout
        found.append(load_file(*run.glob(f"checkpoints/*{STEPS}/weights.safetensors")))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
