"""The student's training steps by `torch.compile`, and what compiling costs."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kd_pipeline._core.text import printable
from kd_pipeline._core.torch_compile import cache_folder, is_compile_error, torch_compile
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.modules import call_network

__all__ = ["CompiledStudent"]

_logger = logging.getLogger("kd_pipeline")


class CompiledStudent:
    """Compiles at its first batch, and for that batch size alone: others run without it.

    Validation runs the student itself, so nothing is compiled for its mode and batch sizes. It is no `nn.Module`, so it
    is no second submodule with the same weights.
    """

    def __init__(self, student: nn.Module) -> None:
        self._student = student
        self._compiled: Callable[..., Any] = torch_compile(student)
        self._num_rows: int | None = None
        self._started_s: float | None = None

    def __call__(self, inputs: Tensor | Mapping[str, Tensor]) -> Any:
        """What the student returns for its only input, or for several by name.

        Raises:
            ConfigError: it cannot be compiled.
        """
        named = {"": inputs} if isinstance(inputs, Tensor) else inputs
        num_rows = len(next(iter(named.values())))
        if self._num_rows is None:
            self._num_rows, self._started_s = num_rows, time.perf_counter()
            _logger.info(
                "compiling the student and its loss (train.compile), which can take a minute or more; what is compiled "
                "is kept in %s for later runs",
                cache_folder(),
            )
        if num_rows != self._num_rows:
            return call_network(self._student, inputs)
        with self.explained():
            return self._compiled(inputs) if isinstance(inputs, Tensor) else self._compiled(**inputs)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise what fails in compiling as a `ConfigError`; the backward pass is compiled when it first runs."""
        if self._started_s is None:
            yield
            return
        try:
            yield
        except Exception as exc:
            if not is_compile_error(exc):
                raise
            reason = printable(str(exc).partition("\n")[0])
            raise ConfigError(
                f"train.compile: torch.compile fails on the student or its loss: {reason}. On a CPU it needs a C++ "
                "compiler such as g++; install one, or set train.compile: false"
            ) from exc

    def end_step(self) -> bool:
        """Whether this was the step that compiled; says then how long it took. Call it at the end of each step."""
        started_s, self._started_s = self._started_s, None
        if started_s is None:
            return False
        _logger.info("compiled them, and took the first step in %.0f s", time.perf_counter() - started_s)
        return True
