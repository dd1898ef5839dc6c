"""The grid that tune's choice is compared with."""

import pytest

from benchmarks.tune import _grid
from kd_pipeline.errors import ConfigError


def test_grid_is_every_combination() -> None:
    grid = _grid(["train.num_threads=1,2", "teacher.precision=fp32,bf16"])
    assert len(set(grid)) == 4
    assert (("teacher.precision", "bf16"), ("train.num_threads", 1)) in grid


def test_grid_without_values_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--grid data\.prefetch: give a setting and its values"):
        _grid(["data.prefetch"])
