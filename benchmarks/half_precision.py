"""FactorVAE under DDP and under DeepSpeed, in half precision: images a second and peak memory.

    ./run python benchmarks/half_precision.py [--batches 64 1024] [--steps 1000]

Every number is of a run of `vaedist/train.py` in a process of its own, on the set of recipe=quickstart; they take
turns. A run logs every tenth of its steps: its speed is the median of its rows but for the first three, in which
kernels are chosen and, under DDP on a GPU, the step is captured as a graph (DeepSpeed's steps are launched kernel by
kernel). `x ddp` is the number of images a second divided by that of DDP in the same turn. GB: of a GPU at the peak,
else of the process.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from vaedist.recipe import load

TRAIN = Path(__file__).resolve().parents[1] / "vaedist" / "train.py"
ENGINES = {
    "ddp": ("train.engine=ddp",),
    "ddp, kernel by kernel": ("train.engine=ddp", "train.capture=false"),
    "ZeRO-2": ("train.engine=deepspeed", "train.zero_stage=2"),
}
SETTLE = 3  # rows
DATA = ("data.shards=data/quickstart", "data.draw=2000", "data.crop=null")  # as recipe=quickstart has it


def run(run: Path, batch: int, precision: str, steps: int, *engine: str) -> tuple[float, float]:
    """Images a second and gigabytes."""
    often = max(1, steps // 10)
    words = [
        "recipe=factorvae", *DATA, f"run={run}", f"train.batch={batch}", f"train.steps={steps}",
        f"train.precision={precision}", f"track.every={often}", "evaluate.names=[]", f"evaluate.every={steps}",
        f"checkpoint.every={steps}", "debug.memory=true", "track.wandb=off", *engine,
    ]  # fmt: skip
    done = subprocess.run([sys.executable, TRAIN, *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    sys.stderr.writelines(f"{line}\n" for line in done.stdout.splitlines() if "kernel by kernel" in line)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][SETTLE:]
    return statistics.median(row["perf/images_per_s"] for row in rows), max(row["perf/memory_gb"] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 1024])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp16"])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=1)
    told = parser.parse_args()
    load(["recipe=factorvae", *DATA])[0].data.find(print)  # which draws it
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")
    print(
        "| images a step | precision | | images/s | steps/s | x ddp | GB |\n|---|---|---|---|---|---|---|", flush=True
    )
    for batch, precision in itertools.product(told.batches, told.precisions):
        found: dict[str, list[tuple[float, float]]] = {engine: [] for engine in ENGINES}
        with tempfile.TemporaryDirectory() as folder:
            for turn, (engine, words) in itertools.product(range(told.turns), ENGINES.items()):
                found[engine].append(run(Path(folder) / f"{engine}-{turn}", batch, precision, told.steps, *words))
        for engine, turns in found.items():
            speed, memory = statistics.median(one for one, _ in turns), max(one for _, one in turns)
            ratio = statistics.median(one / ddp for (one, _), (ddp, _) in zip(turns, found["ddp"], strict=True))
            print(
                f"| {batch} | {precision} | {engine} | {speed:,.0f} | {speed / batch:,.1f} "
                f"| {ratio:.2f} | {memory:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
