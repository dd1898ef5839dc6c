"""What is known about the file of each sample: looked at once, in little memory."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kd_pipeline.data import file_kinds
from kd_pipeline.data.file_kinds import FileKinds
from kd_pipeline.data.headers import Decoder, Header

Look = Callable[..., tuple[list[int], list[int], int]]


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Look:
    """Asks for the files of some samples; returns decoders, bytes of a pixel, and how many headers were read."""
    kinds = FileKinds(orientation="upright", max_pixels=1, num_threads=1)
    read: list[int] = []

    def read_header(data: memoryview) -> Header:
        read.append(1)
        decoder, pixel_bytes = data.tolist()
        return Header("", Decoder(decoder), pixel_bytes=pixel_bytes)

    monkeypatch.setattr(file_kinds, "read_header", read_header)

    def look(index: list[int], files: list[tuple[Decoder, int]], lengths: list[int] | None = None, intact: int = -1):
        def file_of(row: int) -> NDArray[np.uint64]:
            return np.array(files[row], np.uint64)

        read.clear()
        if intact >= 0:
            kinds.set_intact(intact)
        sizes = None if lengths is None else np.array(lengths)
        decoders, pixel_bytes = kinds.decoders(np.array(index), sizes, file_of)
        return decoders.tolist(), pixel_bytes.tolist(), len(read)

    return look


PLAIN, DEEP, RARE = (Decoder.DALI, 3), (Decoder.DALI_CHECKED, 8), (Decoder.PILLOW, 3)


def found(*files: tuple[Decoder, int]) -> tuple[list[int], list[int]]:
    return [int(decoder) for decoder, _ in files], [pixel_bytes for _, pixel_bytes in files]


@pytest.mark.parametrize("lengths", [None, [10, 20, 30]], ids=["bytes", "files"])
def test_header_of_a_sample_is_read_once(look, lengths):
    assert look([7, 2, 10**6], [PLAIN, DEEP, RARE], lengths) == (*found(PLAIN, DEEP, RARE), 3)
    back = None if lengths is None else [30, 10, 20]
    assert look([10**6, 7, 2], [], back) == (*found(RARE, PLAIN, DEEP), 0)


def test_header_of_a_file_of_another_length_is_read_again(look):
    look([0, 1], [PLAIN, PLAIN], [10, 20])
    assert look([0, 1], [DEEP, RARE], [10, 21]) == (*found(PLAIN, RARE), 1)
    assert look([0, 1], [], [10, 21]) == (*found(PLAIN, RARE), 0)


def test_intact_file_is_not_checked_again(look):
    look([0, 1], [DEEP, DEEP])
    assert look([0, 1], [], intact=1) == (*found(DEEP, (Decoder.DALI, 8)), 0)


def test_kinds_beyond_those_that_fit_are_read_again(look):
    many = [(Decoder.DALI_CHECKED, number) for number in range(300)]
    index = list(range(300))
    assert look(index, many) == (*found(*many), 300)
    assert look(index, many, intact=299) == (*found(*many), 45)


def test_samples_of_bytes_take_one_byte_each(look):
    tracemalloc.start()
    look([10**7], [PLAIN])
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1.1 * 10**7
