"""End a run before its last epoch when nothing gets better any more."""

import math
from typing import Any

from kd_pipeline.errors import ConfigError
from kd_pipeline.training.checkpoint import CheckpointCallback
from kd_pipeline.training.settings import EarlyStoppingSettings

__all__ = ["StopEarly"]


class StopEarly(CheckpointCallback):
    """Looks at one figure after each epoch; to stand before `SaveLastAndBest`, which saves what was seen.

    Not Lightning's `EarlyStopping`: a run that it has stopped trains one more epoch each time it is started again, and
    the patience that it began with cannot be changed.
    """

    def __init__(self, settings: EarlyStoppingSettings) -> None:
        self._settings = settings
        self._best = -math.inf
        self._num_waited = 0

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and the epochs since."""
        return {"metric": self._settings.metric, "best": self._best, "num_waited": self._num_waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on waiting, unless it was for another figure."""
        if state["metric"] == self._settings.metric:
            self._best, self._num_waited = state["best"], state["num_waited"]

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """A run that was stopped stays so."""
        trainer.should_stop = self._is_over()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Compare; NaN is no better than anything.

        Raises:
            ConfigError: nothing has logged the figure.
        """
        metric, figures = self._settings.metric, trainer.callback_metrics
        if metric not in figures:
            raise ConfigError(f"early_stopping.metric: there is no {metric!r}; there are {', '.join(sorted(figures))}")
        # The first rank decides for all, as figures may differ in the last digit.
        value = trainer.strategy.broadcast(float(figures[metric])) * (1 if self._settings.mode == "max" else -1)
        self._num_waited = 0 if value > self._best else self._num_waited + 1
        self._best = value if value > self._best else self._best
        trainer.should_stop = trainer.should_stop or self._is_over()

    def _is_over(self) -> bool:
        return self._num_waited >= self._settings.patience
