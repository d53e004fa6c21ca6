"""Every objective under every stage of DeepSpeed's ZeRO: how far its losses are from the golden ones of DDP in float64.

    ./run python benchmarks/zero_stages.py [PROCESSES ...]       on 1 and 2 processes without it; some minutes

The first half of a run has one micro-batch a step, the second, from its checkpoint, two. A number is the largest
difference of a loss, as a part of it. The exit status is 1 if one is above 1e-4.
"""

import gc
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import cases  # noqa: E402
import engines  # noqa: E402
from launching import launch  # noqa: E402
from test_world_size import loss_distance, steps  # noqa: E402

from vaedist import backend  # noqa: E402

TOLERANCE = 1e-4


def worker(data: Path, out: Path) -> None:
    """One rank."""
    opened = backend.Backend(backend.Config(engine="deepspeed", zero_stage=0))
    for stage in engines.STAGES:
        for case in cases.CASES:
            engine = {"train_engine": "deepspeed", "train_zero_stage": stage}
            accumulate = 1 if case in cases.COUPLED else 2
            engines.run(case, data, out / f"{case}-{stage}", train_steps=steps(case) // 2, **engine)
            engines.run(case, data, out / f"{case}-{stage}", train_accumulate=accumulate, **engine)
    opened.close()


def main() -> None:
    sizes = [int(word) for word in sys.argv[1:]] or [1, 2]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "set"
        cases.pack_discs(data)
        for size in sizes:
            words = ("--worker", data, Path(folder) / str(size))
            done = launch(*words, processes=size if size > 1 else None, script=Path(__file__), timeout=3600)
            if done.returncode:
                sys.exit(done.stderr)
        print(f"{'processes and stage':24}" + "".join(f"{f'{n}, {s}':>9}" for n in sizes for s in engines.STAGES))
        worst = 0.0
        for case in cases.CASES:
            found = [
                loss_distance(Path(folder) / str(n) / f"{case}-{stage}", case)
                for n in sizes
                for stage in engines.STAGES
            ]
            worst = max(worst, *found)
            print(f"{case:24}" + "".join(f"{distance:9.0e}" for distance in found))
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        gc.freeze()  # DeepSpeed collects garbage at each of many starts, and the packages are none
        worker(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
