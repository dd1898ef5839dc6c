"""Photographs of the size that the measurements use, but few."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kd_pipeline.bench.photographs import make_photographs
from tests.forks import fork_context

NUM_PHOTOGRAPHS = 40


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 JPEG files in ten class folders; do not change it."""
    return make_photographs(tmp_path_factory.mktemp("bench") / "photographs", num_files=NUM_PHOTOGRAPHS)


@pytest.fixture(scope="package", autouse=True)
def workers_are_forks() -> Iterator[None]:
    """Each row of `bench step` is a process, and a new one imports for seconds: `tests/cli` has those."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kd_pipeline.bench.step_worker.spawn_context", fork_context)
        yield
