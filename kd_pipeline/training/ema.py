"""An exponential moving average of the student's weights, which often generalizes better than the weights."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kd_pipeline._core.settings import Settings
from kd_pipeline.errors import StateError
from kd_pipeline.training.sharding import whole

__all__ = ["EmaSettings", "StudentEma"]


class EmaSettings(Settings):
    """How slowly the average forgets."""

    decay: float = Field(default=0.9999, ge=0, lt=1)
    """What is left of the average at an update; the student's weights make up the rest."""
    warmup: bool = True
    """Forget faster at first: the n-th update, counted from 0, uses (1 + n) / (10 + n) where that is less than
    `decay`, so that the weights the student began with do not linger."""
    every_steps: int = Field(default=1, ge=1)
    """Steps of the optimizer from one update to the next."""


class StudentEma:
    """The average of a student's weights over its training, as a network of its own that never trains.

    Parameters are averaged in float32, whatever the student's dtype. Buffers, such as the statistics of BatchNorm, are
    the student's latest: they are running averages already, or counts.

    Nothing but the student goes in: no teacher, and no projector that a loss brought. It is not an `nn.Module`, so that
    it cannot slip into an optimizer, a wrapper or `train()`.
    """

    def __init__(self, student: nn.Module, settings: EmaSettings) -> None:
        self._settings = settings
        self._num_steps = 0
        self._student = copy.deepcopy(student).float().eval().requires_grad_(False)

    @property
    def student(self) -> nn.Module:
        """The averaged student, in eval mode, on the device of the student that it was last updated from."""
        return self._student

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Take in the weights of `student`; to be called after each step of the optimizer, on all ranks."""
        self._num_steps += 1
        if self._num_steps % self._settings.every_steps:
            return
        parameters = list(student.parameters())
        self._student.to(parameters[0].device)
        average = get_ema_multi_avg_fn(self._decay())  # type: ignore[no-untyped-call]
        latest_weights = [whole(parameter).float() for parameter in parameters]
        average(list(self._student.parameters()), latest_weights, self._num_steps)
        for mine, latest in zip(self._student.buffers(), student.buffers(), strict=True):
            mine.copy_(latest)

    def _decay(self) -> float:
        if not self._settings.warmup:
            return self._settings.decay
        num_before = self._num_steps // self._settings.every_steps - 1
        return min(self._settings.decay, (1 + num_before) / (10 + num_before))

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on exactly: tensors and plain values."""
        return {"num_steps": self._num_steps, "student": self._student.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            StateError: it is the average of another network.
        """
        try:
            self._student.load_state_dict(state["student"])
        except RuntimeError as exc:
            raise StateError(f"the saved average of the student is that of another network: {exc}") from exc
        self._num_steps = state["num_steps"]
