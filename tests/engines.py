"""One rank of `test_engines.py`: `engines.py DATA OUT` runs the cases under every stage of ZeRO; rank 0 reports."""

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
from vaedist.config import available

STAGES = (0, 1, 2, 3)
OBJECTIVES = available("vaedist.objectives")
QUIET = {"debug_replicas": 5, "train_precision": "fp32"}
EXTRAS = {  # the same under every engine
    "clip": {"train_clip": "100"},
    "ema": {"train_ema": "0.9"},
    "bf16": {"train_precision": "bf16"},
    "fp16": {"train_precision": "fp16"},
}
# Every objective under every stage, its variants and the real networks under the one that divides everything.
RUNS = [(case, stage) for case in cases.CASES for stage in STAGES if stage == 3 or case in OBJECTIVES]
OVERFLOWING = 2.0**20  # a first loss scale that some of the first steps are skipped with


def run(case: str, data: Path, directory: Path, **more: object) -> None:
    AcceleratorState._reset_state(False)  # accelerate is made for one engine a process
    with patch.object(backend, "FIRST_SCALE", OVERFLOWING):
        cases.run(case, data, directory, **QUIET | more)
    if dist.is_initialized():
        dist.barrier()  # a run that goes on here finds what rank 0 has written


def half(source: Path, directory: Path) -> None:
    """What is left of a run that was killed after its first checkpoint."""
    first = min((source / "checkpoints").glob("step-*"))
    (directory / "checkpoints").mkdir(parents=True)
    shutil.copytree(first, directory / "checkpoints" / first.name)
    shutil.copy(source / "metrics.jsonl", directory)


def everything(data: Path, out: Path) -> None:
    """The first half of a run in one micro-batch a step, the second, from its checkpoint, in two."""
    first = backend.Backend(backend.Config(engine="deepspeed", zero_stage=0))
    world, found = first.world, {"world_size": first.world.size, "diverged": []}
    for stage in STAGES:
        engine = {"train_engine": "deepspeed", "train_zero_stage": stage}
        run("factorvae", data, out / f"moved-{stage}", **engine)
        run("factorvae", data, out / f"whole-{stage}", **engine)
        if world.size != 2:
            continue
        for case in (case for case, divided in RUNS if divided == stage):
            steps = int((cases.COMMON | cases.CASES[case])["train.steps"])
            run(case, data, out / f"{case}-{stage}", train_steps=steps // 2, **engine)
            run(case, data, out / f"{case}-{stage}", train_accumulate=1 if case in cases.COUPLED else 2, **engine)
        if world.rank == 0:
            half(out / f"whole-{stage}", out / f"again-{stage}")
        dist.barrier()
        run("factorvae", data, out / f"again-{stage}", **engine)
        for name, more in EXTRAS.items():
            run("factorvae", data, out / f"{name}-{stage}", **more, **engine)
        if stage:
            more = {"train_offload_param": "cpu"} if stage == 3 else {}
            run("factorvae", data, out / f"offload-{stage}", train_offload_optimizer="cpu", **more, **engine)
            found["diverged"].append(diverge(data, out / f"diverged-{stage}", world.rank, engine))
    if world.rank == 0:
        (out / "found.json").write_text(json.dumps(found))
    dist.barrier()
    first.close()


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
    everything(*map(Path, sys.argv[1:]))
