"""What the student of a stage returns, as far as that is known before it is trained."""

from collections.abc import Callable, Mapping
from functools import cached_property

from torch import Tensor, nn

from kd_pipeline.losses.dry_run import run_dry
from kd_pipeline.losses.settings import LOGITS
from kd_pipeline.models.registry import ModelSettings

__all__ = ["StudentOutputs"]


class StudentOutputs:
    """Says it from the settings of a network, or from a run of the user's own on zeros, whose modes are unchanged."""

    def __init__(
        self,
        network: ModelSettings | None,
        own: nn.Module | None,
        example: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """Describe a network by its settings, or else the user's own by what it returns for `example()`."""
        self._network, self._own, self._example = network, own, example

    @property
    def is_headless(self) -> bool:
        """Whether there are no logits.

        Raises:
            ConfigError: a network of the user's own fails, or returns something else than tensors.
        """
        return self._own_logits_ndim is None if self._network is None else self._network.is_headless

    @property
    def may_be_of_pixels(self) -> bool:
        """Whether there may be logits of pixels; raises as `is_headless` does."""
        return self._own_logits_ndim == 4 if self._network is None else self._network.is_of_pixels is not False

    @cached_property
    def _own_logits_ndim(self) -> int | None:
        assert self._own is not None
        logits = run_dry(self._own, (), self._example()).outputs.get(LOGITS)
        return None if logits is None else logits.ndim
