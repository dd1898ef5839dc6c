"""Losses by `torch.compile`: which calls are compiled, and that the values are those of the functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_pipeline import losses
from kd_pipeline.losses import compiled
from kd_pipeline.losses.compiled import CompiledLosses

STUDENT, TEACHER = torch.randn(2, 8, 5).unbind()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The names and rows of the calls that were compiled."""
    found: list[tuple[str, int]] = []

    def compile_nothing(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(student: Tensor, *others: Any, **options: Any) -> Tensor:
            found.append((function.__name__, len(student)))
            return function(student, *others, **options)

        return call

    monkeypatch.setattr(compiled, "torch_compile", compile_nothing)
    return found


def test_first_shapes_and_options_are_compiled(calls: list[tuple[str, int]]) -> None:
    functions = CompiledLosses()
    for rows, temperature in ((8, 4.0), (8, 4.0), (3, 4.0), (8, 2.0), (8, 4.0)):
        pair = STUDENT[:rows], TEACHER[:rows]
        found = functions("soft_target")(*pair, temperature=temperature)
        assert found == losses.soft_target(*pair, temperature=temperature)
    functions("logit_mse")(STUDENT, TEACHER)
    assert calls == [("soft_target", 8)] * 3 + [("logit_mse", 8)]
