"""An exponential moving average (EMA) of the student's weights, which often generalizes better than the weights."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kd_pipeline._core.settings import Settings
from kd_pipeline.errors import StateError
from kd_pipeline.training.sharding import full_tensor

__all__ = ["EmaSettings", "StudentEma"]


class EmaSettings(Settings):
    """How fast the average follows the weights."""

    decay: float = Field(default=0.9999, ge=0, lt=1)
    """Weight of the old average in an update; the student's weights get the rest."""
    warmup: bool = True
    """Start with a lower decay: update n, counted from 0, uses min(`decay`, (1 + n) / (10 + n)), so the initial weights
    are soon forgotten. timm's `ModelEmaV3` has another warm-up, 1 - (n + 1)^(-2/3)."""
    every_steps: int = Field(default=1, ge=1)
    """Optimizer steps between updates."""


class StudentEma:
    """The averaged student, as a network of its own that is never trained.

    Parameters are averaged in float32, whatever the student's dtype. Buffers, such as BatchNorm statistics, are copied
    from the student: they are running averages already, or counts. (timm's `ModelEmaV3` averages them too, unless it is
    told to exclude them.)

    It holds the student alone: no teacher, and no projectors of the loss. It is no `nn.Module`, so it cannot slip into
    an optimizer, a wrapper or `train()`.
    """

    def __init__(self, student: nn.Module, settings: EmaSettings) -> None:
        self._settings = settings
        self._num_steps = 0
        self._student = copy.deepcopy(student).float().eval().requires_grad_(False)

    @property
    def student(self) -> nn.Module:
        """The averaged student, in eval mode, on the device of the student at the last update."""
        return self._student

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Update the average with the weights of `student`; call it after each optimizer step, on all ranks."""
        self._num_steps += 1
        if self._num_steps % self._settings.every_steps:
            return
        parameters = list(student.parameters())
        self._student.to(parameters[0].device)
        average = get_ema_multi_avg_fn(self._decay())  # type: ignore[no-untyped-call]
        weights = [full_tensor(parameter).float() for parameter in parameters]
        average(list(self._student.parameters()), weights, self._num_steps)
        for averaged, buffer in zip(self._student.buffers(), student.buffers(), strict=True):
            averaged.copy_(buffer)

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to resume exactly: tensors and plain values."""
        return {"num_steps": self._num_steps, "student": self._student.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned.

        Raises:
            StateError: it is the average of a different network.
        """
        try:
            self._student.load_state_dict(state["student"])
        except RuntimeError as exc:
            raise StateError(f"the saved EMA belongs to a different student: {exc}") from exc
        self._num_steps = state["num_steps"]

    def _decay(self) -> float:
        if not self._settings.warmup:
            return self._settings.decay
        num_updates = self._num_steps // self._settings.every_steps - 1
        return min(self._settings.decay, (1 + num_updates) / (10 + num_updates))
