"""The data set that the runs of all test files train on, and what tests of a GPU do without one."""

from pathlib import Path

import cases
import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Packed once by each process of the tests; nobody changes it."""
    directory = tmp_path_factory.mktemp("discs") / "set"
    cases.pack_discs(directory)
    return directory
