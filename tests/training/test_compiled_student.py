"""What compiling costs is said, and what fails in it."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.exc import InductorError

from kd_pipeline.errors import ConfigError
from kd_pipeline.training import compiled_student
from kd_pipeline.training.compiled_student import CompiledStudent

IMAGES = torch.rand(8, 3, 4, 4)


class Compiled:
    """Takes the place of what torch has compiled."""

    def __init__(self, error: Exception | None = None) -> None:
        self.sizes: list[int] = []
        self._error = error

    def __call__(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        if self._error is not None:
            raise self._error
        return images.sum((1, 2, 3))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[Compiled], CompiledStudent]:
    def open_student(compiled: Compiled) -> CompiledStudent:
        monkeypatch.setattr(compiled_student, "torch_compile", lambda student: compiled)
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/kept/here")
        return CompiledStudent(nn.Identity())

    return open_student


def test_cost_is_said_once(opened: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kd_pipeline")
    compiled = Compiled()
    student = opened(compiled)
    assert caplog.messages == []
    assert [(student(IMAGES).shape, student.end_step())[1] for _ in range(3)] == [True, False, False]
    before, after = caplog.messages
    assert (
        before.startswith("compiling the student and its loss (train.compile), which can take a minute")
        and "/kept/here" in before
    )
    assert after == "compiled them, and took the first step in 0 s"


def test_other_batch_sizes_are_not_compiled(opened: Any) -> None:
    compiled = Compiled()
    student = opened(compiled)
    for size in (8, 3, 8, 7):
        student(IMAGES[:size])
    assert compiled.sizes == [8, 8]


def test_failure_says_what_to_do(opened: Any) -> None:
    error = InductorError(RuntimeError("no compiler\nset TORCHDYNAMO_VERBOSE=1"), None)
    with pytest.raises(ConfigError) as caught:
        opened(Compiled(error))(IMAGES)
    message = str(caught.value)
    assert (
        "torch.compile fails on the student or its loss: RuntimeError: no compiler. On a CPU it needs a C++ compiler"
        in message
    )
    assert "set train.compile: false" in message and "VERBOSE" not in message


def test_other_errors_stay(opened: Any) -> None:
    student = opened(Compiled(ValueError("of the network")))
    with pytest.raises(ValueError, match="of the network"):
        student(IMAGES)
