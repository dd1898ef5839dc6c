"""Pages of memory-mapped files are read before they are needed, and a file that was cut off is found out."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from kd_pipeline._core.mapped_memory import page_in, page_in_later


@pytest.fixture
def arrays(tmp_path: Path) -> list[np.ndarray]:
    """Four arrays of 10,000 bytes in a mapped file, which is `tmp_path / "file"`."""
    (tmp_path / "file").write_bytes(bytes(40_000))
    with open(tmp_path / "file", "rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    return [mapped[start : start + 10_000] for start in range(0, 40_000, 10_000)]


def test_pages_of_a_file(arrays: list[np.ndarray]) -> None:
    page_in_later(arrays)
    assert page_in([*arrays, arrays[0][:0], np.zeros(10, np.uint8)]) is None
    assert not any(array.any() for array in arrays)


def test_array_that_is_no_longer_in_its_file(arrays: list[np.ndarray], tmp_path: Path) -> None:
    os.truncate(tmp_path / "file", 20_480)
    failed = [page_in(arrays[:2]), page_in(arrays)]  # a failed assertion would show the arrays, and end the process
    assert failed == [None, 2]


def test_a_system_that_cannot_say(arrays: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kd_pipeline._core.mapped_memory._POPULATE_READ", 10_000)  # no such advice
    os.truncate(tmp_path / "file", 20_480)
    failed = page_in(arrays)
    assert failed is None
