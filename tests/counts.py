"""Counts what steps cost in forked processes: `counts.py DATA OUT` leaves OUT/SIZE-RANK.json, by objective."""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # optimisers import it, for seconds: once, before the fork
from attempts import forked
from torch.distributed import TCPStore
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vaedist.backend import Backend
from vaedist.console import Console
from vaedist.recipe import load
from vaedist.stop import Stop
from vaedist.trainer import train

OBJECTIVES, SIZES, BATCH = ("vae", "factorvae", "factorvae train.precision=bf16", "betatcvae"), (1, 2), 8
COUNTED = ("operations", "tensors", "bytes", "reads")
STEPS = 4  # of which the first are not counted


class Enough(Exception):  # noqa: N818
    """The steps to count were made."""


class Operations(TorchDispatchMode):
    """Counts what this thread computes, backward passes included; `sent` lists the bytes of its collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        space, name = function.namespace, function._schema.name.partition("::")[2]
        if space == "c10d":
            given = tensors(args[1] if name.startswith("_") else args[0])
            self.sent.append((name, sum(tensor.nbytes for tensor in given)))
        elif name == "_local_scalar_dense":
            self.found["reads"] += 1
        elif not function.is_view:
            known = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
            made = [tensor for tensor in tensors(result) if tensor.untyped_storage().data_ptr() not in known]
            self.found += Counter(operations=1, tensors=len(made), bytes=sum(tensor.nbytes for tensor in made))
        return result


class Reads(TorchFunctionMode):
    """Counts what the dispatcher does not see of a CPU, and what would make the host wait for a GPU."""

    def __init__(self, found: Counter[str]) -> None:
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found["reads"] += getattr(function, "__name__", "") in ("tolist", "numpy", "cpu")
        return function(*args, **(kwargs or {}))


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def count(objective: str, data: Path, run: Path, between: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """Work and traffic of a step, which are those of the next one; `between` is called after every step."""
    words = [*f"recipe={objective}".split(), f"data.shards={data}", f"data.cache={data.parent / 'cache'}", f"run={run}"]
    recipe, _ = load([*words, "data.crop=null", f"train.batch={BATCH}", "train.capture=false", "track.wandb=off"])
    mode, ends = Operations(), []

    def step(console: Console) -> None:
        ends.append((mode.found.copy(), len(mode.sent)))
        between(len(ends))
        if len(ends) == STEPS:
            raise Enough

    with pytest.MonkeyPatch.context() as patch, suppress(Enough), mode, Reads(mode.found):
        patch.setattr(Console, "step", step)
        train(recipe, Backend(recipe.train), Stop())
    found = []
    for (before, start), (after, stop) in pairwise(ends[1:]):
        sent: dict[str, list[int]] = {}
        for name, size in sorted(mode.sent[start:stop]):
            sent.setdefault(name, []).append(size)
        found.append({"work": {name: after[name] - before[name] for name in COUNTED}, "traffic": sent})
    assert found[0] == found[1], "two steps that cost different amounts"
    return found[0]


def fork(size: int, data: Path, out: Path) -> list[int]:
    """The processes, which count all objectives; importing torch would take longer than all the rest."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    where = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    where |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "ACCELERATE_USE_CPU": "true"}

    def run(rank: int) -> int:
        here = where | {"RANK": rank, "LOCAL_RANK": rank}
        os.environ.update({name: str(value) for name, value in here.items()})
        found = {objective: count(objective, data, out / f"{objective}-{size}") for objective in OBJECTIVES}
        (out / f"{size}-{rank}.json").write_text(json.dumps(found))
        return 0

    children = [forked(run, rank) for rank in range(size)]
    return [os.waitpid(child, 0)[1] for child in children]


if __name__ == "__main__":
    data, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    sys.exit(any(status for size in SIZES for status in fork(size, data, out)))
