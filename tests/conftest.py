"""The data set that the runs of all test files train on."""

from pathlib import Path

import cases
import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Packed once by each process of the tests; nobody changes it."""
    directory = tmp_path_factory.mktemp("discs") / "set"
    cases.pack_discs(directory)
    return directory


FIRST = ("test_slurm", "test_world_size", "test_trainer", "test_numerics", "test_stops")  # who takes or waits longest


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """These files go first: begun last, one of them would keep a process of the tests busy while the others idle."""
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))
