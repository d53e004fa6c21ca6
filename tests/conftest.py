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
