"""Stop a run when its metric no longer improves."""

import math
from collections.abc import Callable
from logging import getLogger
from typing import Any

from kd_pipeline._core.optional import require
from kd_pipeline.errors import ConfigError
from kd_pipeline.training.settings import EarlyStoppingSettings

__all__ = ["StopEarly"]

_logger = getLogger(__name__)
_callbacks = require("lightning.pytorch.callbacks", extra="train")


class StopEarly(_callbacks.Checkpoint):  # type: ignore[misc, name-defined]
    """Checks one metric after each epoch. List it before `SaveLastAndBest`, which then saves its state too.

    It is a `Checkpoint` because Lightning calls those after all other callbacks.

    Lightning's `EarlyStopping` does not fit: a stopped run trains one more epoch each time it is started again, and its
    patience cannot be changed on resume.
    """

    def __init__(
        self, settings: EarlyStoppingSettings, *, is_measured: Callable[[str], bool] = lambda metric: True
    ) -> None:
        """Stop by `settings.metric`, which is set.

        Args:
            settings: the metric and the patience.
            is_measured: whether the last validation measured a metric. Lightning keeps the value of an earlier one.
        """
        assert settings.metric is not None
        self._settings, self._metric, self._is_measured = settings, settings.metric, is_measured
        self._best = -math.inf
        self._num_waited = 0

    def state_dict(self) -> dict[str, Any]:
        """The best value so far and the number of epochs since then."""
        return {"metric": self._metric, "best": self._best, "num_waited": self._num_waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume, unless the state is of a different metric."""
        if state["metric"] == self._metric:
            self._best, self._num_waited = state["best"], state["num_waited"]

    def on_train_start(self, trainer: Any, module: Any) -> None:
        """Keep a stopped run stopped."""
        trainer.should_stop = self.is_over

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        """Compare with the best epoch so far, unless this one did not measure it; NaN is never better.

        Raises:
            ConfigError: the metric was not logged.
        """
        metric, metrics = self._metric, trainer.callback_metrics
        if not self._is_measured(metric):
            return
        if metric not in metrics:
            raise ConfigError(f"early_stopping.metric: there is no {metric!r}; there are {', '.join(sorted(metrics))}")
        # Rank zero decides for all, because the last digits may differ between ranks.
        value = trainer.strategy.broadcast(float(metrics[metric])) * (-1 if self._settings.mode == "min" else 1)
        if math.isnan(value):
            _logger.warning("%s is NaN after %d steps, which counts as no improvement", metric, trainer.global_step)
        self._num_waited = 0 if value > self._best else self._num_waited + 1
        self._best = value if value > self._best else self._best
        trainer.should_stop = trainer.should_stop or self.is_over

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Say why the run ended before its last epoch."""
        if self.is_over and trainer.is_global_zero and trainer.current_epoch < trainer.max_epochs:
            _logger.info(
                "stopped early after epoch %d of %d: %s has not improved for %d epochs (train.early_stopping)",
                *(trainer.current_epoch, trainer.max_epochs, self._metric, self._num_waited),
            )

    @property
    def is_over(self) -> bool:
        """Whether the metric has not improved for too long."""
        return self._num_waited >= self._settings.patience
