"""Every kernel of ours compiles for the GPUs that people have: to machine code, without one."""

import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vaedist.layers import channels_last

GPUS = {"A100": 80, "RTX 4090": 89, "H100": 90}
PRECISIONS = [  # of the images, of the products, and whether these may be TF32
    (torch.float32, torch.float32, False), (torch.float32, torch.float32, True), (torch.float32, torch.bfloat16, False),
    (torch.bfloat16, torch.bfloat16, False), (torch.float16, torch.float16, False),
]  # fmt: skip
ON_CORES = [precision for precision in PRECISIONS if precision[1] != torch.float32 or precision[2]]
LAYERS = (1, 32), (3, 32), (32, 32), (32, 64), (64, 64)  # those next to images, and the inner ones of replicas


class NoGPU:
    """What triton asks of a GPU before it launches something there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """A kernel whose launch is its compilation."""

    def __init__(self, kernel: Any, made: list[str]) -> None:
        self.kernel, self.made = kernel, made

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*given: Any, **options: Any) -> None:
            name, made = self.kernel.__name__, self.kernel.warmup(*given, grid=grid, **options).asm
            assert len(made["cubin"]) > 1000
            assert name not in ("_adam", "_copied") or ".v4.b32" in made["ptx"], "numbers go one by one"
            self.made.append(name)

        return launch


def compile_all(capability: int) -> list[str]:
    driver.set_active(NoGPU(capability))
    from vaedist import kernels

    made: list[str] = []
    for name in ("_down", "_up", "_weight", "_hashed", "_adam", "_copied"):
        setattr(kernels, name, Compiled(getattr(kernels, name), made))
    torch.cuda.device_of = lambda tensor: nullcontext()
    for channels, outputs in LAYERS:
        for given, dtype, tf32 in PRECISIONS if channels < 32 else ON_CORES:
            x = channels_last(torch.zeros(1, 64, channels, 64, 64)).to(given)
            y = channels_last(torch.zeros(1, 64, outputs, 32, 32)).to(given)
            w = channels_last(torch.zeros(1, outputs, channels, 4, 4)).to(given)
            kernels.down(x, w, dtype, tf32)
            kernels.up(y, w, dtype, tf32)
            kernels.weight(x, y, dtype, tf32)
    kernels.hashed(torch.arange(64), 2**60, 10, 3, 5, 7)
    sizes = [100] * (kernels.TENSORS - 1) + [3]  # the last bias of a decoder
    rows = [[torch.zeros(size) for size in sizes] for _ in range(5)]
    for scaled in (None, torch.zeros(())):
        kernels.adam(rows, scaled, scaled, 1e-4, 0.9, 0.999, 0.0, 1e-8)
    for half in (torch.bfloat16, torch.float16):
        wide, halves = ([torch.zeros(size, dtype=dtype) for size in sizes] for dtype in (torch.float32, half))
        kernels.copy(halves, wide)
        kernels.copy(wide, halves)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
def test_the_kernels_compile(gpu):
    done = subprocess.run([sys.executable, __file__, str(GPUS[gpu])], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "73\n"


if __name__ == "__main__":
    print(len(compile_all(int(sys.argv[1]))))
