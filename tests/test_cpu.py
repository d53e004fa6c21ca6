"""What makes a step fast on a CPU: the layout of images, memory that is kept, threads for the cores there are."""

import subprocess
import sys
from importlib import import_module

import pytest
import torch
from torch import nn

from shards import parallel
from vaedist.config import available
from vaedist.data.pixels import to_float
from vaedist.noise import Noise
from vaedist.world import World


def channels_last(images: torch.Tensor) -> bool:
    return images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", available("vaedist.models"))
def test_every_convolution_reads_and_writes_its_images_channels_last(name):
    size = 128 if name == "conv128" else 64
    settings = {"hidden": 8} if name == "conv128" else {}
    vae = import_module(f"vaedist.models.{name}").Config(**settings).build((3, size, size), World())
    layouts = []
    for layer in vae.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_forward_hook(lambda _, given, made: layouts.extend([*given, made]))
    noise = Noise(0, torch.arange(2))
    vae.decode(vae.encode(torch.rand(2, 3, size, size), noise)[0], noise)
    assert len(layouts) == 16
    assert all(map(channels_last, layouts))


def test_images_come_to_the_networks_channels_last():
    streams = to_float(torch.zeros(2, 5, 3, 4, 4, dtype=torch.uint8), torch.float32, (0, 1))
    assert all(map(channels_last, streams))


FAULTS = """
import resource
from vaedist.heap import keep_freed_memory
keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytes(1) * 2**24 for _ in range(8)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_that_was_freed_is_taken_again_without_new_pages():
    """In a process of its own: others have threads that take pages too."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # of 2^27 bytes in pages of 4096: 32,768


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", None), ("50000 100000", 1), ("99900000 100000", None)])
def test_a_containers_share_of_the_cores_counts(quota, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "QUOTA", tmp_path / "cpu.max")
    free = parallel.cores()
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert parallel.cores() == (cores or free)
