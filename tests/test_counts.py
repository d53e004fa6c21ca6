"""What a step costs that neither logs nor saves, counted and not timed: the same on every machine.

Whoever changes a step on purpose changes these tables; the commit says why.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import counts
import pytest
import torch

# Of one process: operations that are no views, tensors and bytes that they make, numbers that the host reads
WORK = {
    "vae": {"operations": 128, "tensors": 133, "bytes": 18_285_192, "reads": 0},
    "factorvae": {"operations": 244, "tensors": 245, "bytes": 44_947_456, "reads": 0},
    "factorvae train.precision=bf16": {"operations": 340, "tensors": 339, "bytes": 61_186_380, "reads": 0},
    "betatcvae": {"operations": 215, "tensors": 220, "bytes": 18_345_012, "reads": 0},
}
# Of each of two processes: the bytes that it hands to every collective; one is the vote, which nobody waits for
TRAFFIC = {
    "vae": {"allreduce_": [1, 3_065_180]},
    "factorvae": {"_allgather_base_": [160], "allreduce_": [1, 23_137_188]},
    "betatcvae": {"_allgather_base_": [512], "_reduce_scatter_base_": [640], "allreduce_": [1, 3_065_180]},
}


@pytest.fixture(scope="module")
def counted(data, tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    """What each rank has counted, by the number of processes."""
    out = tmp_path_factory.mktemp("counts")
    subprocess.run([sys.executable, Path(counts.__file__), data, out], check=True, capture_output=True)
    return {
        size: [json.loads((out / f"{size}-{rank}.json").read_text()) for rank in range(size)] for size in counts.SIZES
    }


def changes(found: dict[str, Any], told: dict[str, Any]) -> str:
    names = sorted(found.keys() | told.keys())
    lines = [f"{name}: {told.get(name)} -> {found.get(name)}" for name in names if found.get(name) != told.get(name)]
    return "; ".join(lines)


@pytest.mark.parametrize("objective", WORK)
def test_a_step_computes_and_allocates_what_the_table_says_and_reads_nothing(objective, counted):
    (found,) = counted[1]
    assert changes(found[objective]["work"], WORK[objective]) == ""


@pytest.mark.parametrize("objective", TRAFFIC)
def test_the_ranks_send_what_the_table_says(objective, counted):
    for found in counted[2]:
        assert changes(found[objective]["traffic"], TRAFFIC[objective]) == ""
        assert found[objective]["work"]["reads"] == 1  # of the vote, in the memory of the host


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("objective", WORK)
def test_the_host_never_waits_for_the_gpu(objective, data, tmp_path):
    def strict(step: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if 1 < step < counts.STEPS else "default")

    try:
        found = counts.count(objective, data, tmp_path, strict)  # which raises where it waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found["work"]["reads"] == 0
