"""What train.compile gains: time of a training step of the 64x64 network, compiled as a ratio to eager.

    ./run python benchmarks/compile.py [--batch 64] [--turns 15] [OBJECTIVE ...]

Eager and compiled steps take turns in one process on the same random images; a ratio is the median of the turns'. The
first compiled step, which compiles, is told apart. On a CPU a time is that of all threads together.
"""

import argparse
import statistics

import torch
from objectives import build, micros, seconds, step

from vaedist.world import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objectives", nargs="*", default=["vae", "factorvae"], metavar="OBJECTIVE")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--turns", type=int, default=15)
    told = parser.parse_args()
    torch.set_num_threads(1)  # threads that wait for each other count as work
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("| objective | eager ms | compiled / eager | first step s |\n|---|---|---|---|")
    for name in told.objectives:
        eager, compiled = (build(name, {}, World(), device) for _ in range(2))
        compiled.compile(fullgraph=True)
        rows = micros(eager.streams, torch.arange(told.batch, device=device)[None])
        pair = [(each, torch.optim.AdamW(each.param_groups(), lr=1e-4, fused=True)) for each in (eager, compiled)]
        turns = [[seconds(device, step, each, rows, optimizer) for each, optimizer in pair] for _ in range(told.turns)]
        ratio = statistics.median(after / before for before, after in turns[3:])
        milliseconds = 1e3 * statistics.median(before for before, _ in turns[3:])
        print(f"| `{name}` | {milliseconds:.1f} | {ratio:.2f} | {turns[0][1]:.0f} |")


if __name__ == "__main__":
    main()
