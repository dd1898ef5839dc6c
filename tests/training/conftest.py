"""Data for the tiny runs."""

from pathlib import Path

import pytest

from tests.training import tiny_run


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and an untrained teacher; each run in it needs a name of its own."""
    folder = tmp_path_factory.mktemp("digits")
    tiny_run.write_digits(folder)
    return folder
