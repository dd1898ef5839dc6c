"""A function of the user's own as the whole loss of a run."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from kd_pipeline._core.constants import IGNORE_INDEX
from kd_pipeline.batch import KDBatch
from kd_pipeline.losses.distillation import Distillation, LossTerms, scalar_loss, student_outputs
from kd_pipeline.losses.settings import DistillSettings

__all__ = ["OwnLoss"]


class OwnLoss(Distillation):
    """Calls a function of what the student returns and the batch; one that is a module is trained with the student."""

    def __init__(
        self,
        function: Callable[[Any, KDBatch], Tensor],
        settings: DistillSettings,
        *,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        """Take `function`, which returns a scalar: the mean over the valid rows.

        Args:
            function: the loss.
            settings: of the run; they are not used, and said to whoever asks.
            ignore_index: class in `batch.masks` of the pixels that have none.
        """
        nn.Module.__init__(self)
        self.settings = settings
        self.layers = ()
        self._ignore_index = ignore_index
        self._weights, self._terms = {"distill": 1.0}, ()
        self._is_own_loss = True
        self._custom_loss, self._distill_term, self._temperature = None, None, None
        self._custom_task, self._is_own_task, self._compiled = None, False, None
        self._function = function
        self.projectors = nn.ModuleList([function] if isinstance(function, nn.Module) else [])
        self.standardizers, self.queues = nn.ModuleDict(), nn.ModuleDict()

    @property
    def compares_outputs(self) -> bool:
        """True, as the function gets what the student returns."""
        return True

    def forward(
        self,
        outputs: Any,
        features: Mapping[str, Tensor],
        batch: KDBatch,
        *,
        epoch: float,
        epochs: int,
    ) -> LossTerms:
        """The loss of a batch; the arguments are those of `Distillation`.

        Raises:
            ConfigError: the function returns no scalar tensor.
        """
        value = scalar_loss(self._function(outputs, batch), f"distillation: {self._function!r}")
        return LossTerms(value, {"distill": value}, {"distill": 1.0}, None)

    def compared(self, outputs: Any, features: Mapping[str, Tensor]) -> list[Tensor]:
        """All that the student returns, as the function may take any of it."""
        return [*student_outputs(outputs).values()]

    def cosines(self, outputs: Any, features: Mapping[str, Tensor], batch: KDBatch) -> dict[str, Tensor]:
        """None: what the function compares is not known."""
        return {}
