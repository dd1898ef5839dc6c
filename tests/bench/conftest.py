"""Photographs of the size that the measurements use, but few."""

from pathlib import Path

import pytest

from kd_pipeline.bench.photographs import make_photographs

NUM_PHOTOGRAPHS = 40


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 JPEG files in ten class folders; do not change it."""
    return make_photographs(tmp_path_factory.mktemp("bench") / "photographs", num_files=NUM_PHOTOGRAPHS)
