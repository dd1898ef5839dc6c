import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kd_pipeline.errors import StorageError
from kd_pipeline.storage import ByteRange, call_each, parallel, read_ranges
from kd_pipeline.storage.local import LocalStore

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "a.bin").write_bytes(CONTENT)
    return str(tmp_path / "a.bin")


def check_reads(path: str, num_threads: int | None = None) -> None:
    ranges = [ByteRange(path, start, 100) for start in range(0, 10_000, 50)]
    found = read_ranges(LocalStore(), ranges, num_threads)
    assert found == [CONTENT[start : start + 100] for start in range(0, 10_000, 50)]


@pytest.mark.parametrize("num_threads", [None, 1, 2, 200])
def test_ranges_come_in_their_order(path, num_threads):
    check_reads(path, num_threads)
    assert read_ranges(LocalStore(), [], num_threads) == []


def test_error_is_in_the_place_of_its_range(path):
    ranges = [ByteRange(path, 0, 5), ByteRange(path, 0, 10**6), ByteRange(f"{path}.not"), ByteRange(path)]
    first, cut, missing, whole = read_ranges(LocalStore(), ranges)
    assert (first, whole) == (CONTENT[:5], CONTENT)
    assert isinstance(cut, StorageError) and isinstance(missing, StorageError)
    assert "no such file" in str(missing)


def test_other_errors_are_raised(path):
    with pytest.raises(TypeError):
        read_ranges(LocalStore(), [ByteRange(path, 0, 5), ByteRange(path, 0, "x")] * 20, 3)  # type: ignore[arg-type]


def test_reads_run_at_once_if_one_takes_long(path):
    class Meeting(LocalStore):
        num_threads = 3
        barrier = threading.Barrier(3, timeout=10)
        is_first = True

        def read(self, *args, **options):
            if self.is_first:
                self.is_first = False
                time.sleep(0.01)
            else:
                self.barrier.wait()
            return super().read(*args, **options)

    assert read_ranges(Meeting(), [ByteRange(path, 0, 1)] * 10) == [CONTENT[:1]] * 10


def test_what_is_in_memory_is_read_by_one_thread(path, monkeypatch):
    readers = set()

    class Noting(LocalStore):
        def read(self, *args, **options):
            readers.add(threading.get_ident())
            return super().read(*args, **options)

    monkeypatch.setattr(parallel, "perf_counter", lambda: 0.0)  # however busy the machine is
    read_ranges(Noting(), [ByteRange(path, 0, 1)] * 100)
    assert readers == {threading.get_ident()}


def test_calls_run_at_once_and_results_come_in_order():
    barrier = threading.Barrier(3, timeout=10)

    def call(number):
        barrier.wait()
        return number

    assert call_each(call, range(9), 3) == list(range(9))


def test_error_of_a_call_is_raised():
    with pytest.raises(ZeroDivisionError):
        call_each(lambda number: 1 / number, [1, 1, 0, 1] * 10, 3)


def test_several_threads_share_the_pool(path):
    threads = [threading.Thread(target=check_reads, args=(path, 30)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(thread.name == "kd_pipeline-store" for thread in threading.enumerate()) <= 64


def test_fork_has_threads_of_its_own(path):
    check_reads(path, 8)
    child = os.fork()
    if child == 0:
        try:
            check_reads(path, 8)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_bytes_become_an_array_without_a_copy(path):
    (content,) = read_ranges(LocalStore(), [ByteRange(path, 3, 5)])
    assert isinstance(content, bytes)
    array = np.frombuffer(content, np.uint8)
    assert array.tolist() == [3, 4, 5, 6, 7] and array.base is content
