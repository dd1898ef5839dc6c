import numpy
import pytest

from kd_pipeline.losses.hadamard import hadamard

WIDTHS = (1, 2, 4, 12, 20, 28, 36, 44, 60, 192, 320, 384, 512, 640, 768, 1024, 1152, 1280, 1408, 1536, 2048)


@pytest.mark.parametrize("size", WIDTHS)
def test_rows_are_orthogonal(size):
    matrix = hadamard(size)
    assert matrix.shape == (size, size)
    assert (numpy.abs(matrix) == 1).all()
    numbers = matrix.astype(numpy.float32)  # exact for sums of up to 2048 ones
    assert numpy.array_equal(numbers @ numbers.T, size * numpy.eye(size))


@pytest.mark.parametrize("size", [3, 6, 50, 52, 92, 1001])
def test_unknown_sizes(size):
    assert hadamard(size) is None
