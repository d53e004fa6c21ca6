"""One rank of `test_engines.py`: `engines.py DATA OUT [more]` runs cases under every stage of ZeRO; rank 0 reports."""

import gc
import json
import shutil
import sys
from pathlib import Path
from unittest.mock import patch

import cases
import torch.distributed as dist
from accelerate.state import AcceleratorState

from vaedist import backend, trainer

STAGES = (0, 1, 2, 3)
QUIET = {"debug_replicas": 5, "train_precision": "fp32"}
EXTRAS = {  # the same under every engine
    "clip": {"train_clip": "100"},
    "ema": {"train_ema": "0.9"},
    "bf16": {"train_precision": "bf16"},
    "fp16": {"train_precision": "fp16", "train_clip": "100", "train_ema": "0.9"},
}
# A run's first half is under one stage with one micro-batch a step, its second under another, or the same, with two.
# benchmarks/zero_stages.py has every objective under every stage; here each stage has its share of them.
HALVES = [(case, ("13", "20", "32")[number % 3]) for number, case in enumerate(cases.CASES)]
HALVES += [("factorvae", f"{stage}{stage}") for stage in STAGES]
OVERFLOWING = 2.0**7  # a first loss scale with which some steps are skipped


def run(case: str, data: Path, directory: Path, **more: object) -> None:
    AcceleratorState._reset_state(False)  # accelerate is made for one engine a process
    with patch.object(backend, "FIRST_SCALE", OVERFLOWING), patch.object(backend, "STEADY", 3):
        cases.run(case, data, directory, **QUIET | more)
    if dist.is_initialized():
        dist.barrier()  # a run that goes on here finds what rank 0 has written


def half(source: Path, directory: Path) -> None:
    """What is left of a run that was killed after its first checkpoint."""
    first = min((source / "checkpoints").glob("step-*"))
    (directory / "checkpoints").mkdir(parents=True)
    shutil.copytree(first, directory / "checkpoints" / first.name)
    shutil.copy(source / "metrics.jsonl", directory)


def everything(data: Path, out: Path, more: str = "") -> None:
    """Under every stage factorvae, whole, and going on where another engine has stopped; `more` is all of the rest."""
    opened = backend.Backend(backend.Config(engine="deepspeed", zero_stage=0))
    world, found = opened.world, {"world_size": opened.world.size, "diverged": []}
    for stage in STAGES:
        engine = {"train_engine": "deepspeed", "train_zero_stage": stage}
        if more:
            for name in ("clip", "ema", "bf16"):
                run("factorvae", data, out / f"{name}-{stage}", **EXTRAS[name], **engine)
            if stage:
                where = {"train_offload_param": "cpu"} if stage == 3 else {}
                run("factorvae", data, out / f"offload-{stage}", train_offload_optimizer="cpu", **where, **engine)
                found["diverged"].append(diverge(data, out / f"diverged-{stage}", world.rank, engine))
            continue
        run("factorvae", data, out / f"moved-{stage}", **engine)
        run("factorvae", data, out / f"whole-{stage}", **engine)
        # which sums of rows overflow depends on how many ranks sum them: fp16 is held to DDP on one
        name = "fp16" if world.size == 1 else "whole"
        if name == "fp16":
            run("factorvae", data, out / f"fp16-{stage}", **EXTRAS["fp16"], **engine)
        if world.rank == 0:
            half(out / f"{name}-{stage}", out / f"{name}-again-{stage}")
        dist.barrier()
        run("factorvae", data, out / f"{name}-again-{stage}", **EXTRAS.get(name, {}), **engine)
    for case, halves in HALVES if more else []:
        half_of, again = int((cases.COMMON | cases.CASES[case])["train.steps"]) // 2, 1 if case in cases.COUPLED else 2
        first, second = ({"train_engine": "deepspeed", "train_zero_stage": stage} for stage in halves)
        run(case, data, out / f"{case}-{halves}", train_steps=half_of, **first)
        run(case, data, out / f"{case}-{halves}", train_accumulate=again, **second)
    if world.rank == 0:
        (out / "found.json").write_text(json.dumps(found))
    dist.barrier()
    opened.close()


def diverge(data: Path, directory: Path, rank: int, engine: dict[str, object]) -> str:
    """What ends a run in whose third step the gradients of rank 1, and nothing else, are not numbers."""
    honest, taken = backend.Backend.backward, 0

    def backward(self: backend.Backend, loss: object) -> None:
        nonlocal taken
        taken += 1
        honest(self, loss * float("nan") if taken == 3 and rank == 1 else loss)

    with patch.object(backend.Backend, "backward", backward):
        try:
            run("vae", data, directory, **engine)
        except trainer.USER_ERRORS as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


if __name__ == "__main__":
    gc.freeze()  # DeepSpeed collects garbage at each of a hundred starts, and the packages are none
    everything(*map(Path, sys.argv[1:3]), *sys.argv[3:])
