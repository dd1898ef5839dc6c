import ctypes
import os
from pathlib import Path

import pytest

from kd_pipeline._core import memory
from kd_pipeline._core.memory import release_free_memory


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_gaps_are_given_back() -> None:
    library = ctypes.CDLL(None)
    if not hasattr(library, "malloc_trim"):
        pytest.skip("not the GNU C library")
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    # Below the size from which blocks are mapped and unmapped one by one.
    blocks = [library.malloc(100_000) for _ in range(1000)]
    for block in blocks:
        ctypes.memset(ctypes.c_void_p(block), 1, 100_000)
    for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
        library.free(block)
    before = resident_bytes()
    release_free_memory()
    assert before - resident_bytes() > 50_000_000
    library.free(blocks[-1])


def test_other_c_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory._trim.cache_clear()
    release_free_memory()
    memory._trim.cache_clear()
