"""The evaluations of a stage: while it trains, and at the end those of the best student that are not known yet."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from kd_pipeline._core.progress import progress_bar
from kd_pipeline.config.config import Config
from kd_pipeline.evaluation._evaluate import Evaluation
from kd_pipeline.evaluation._metrics import Metric, MetricSettings
from kd_pipeline.evaluation.predictions import Predictions
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.training.module import DistillModule
from kd_pipeline.workflows.evaluation_plan import EvaluationPlan, select_best
from kd_pipeline.workflows.own_validation import OwnEvaluator
from kd_pipeline.workflows.parts import Validate
from kd_pipeline.workflows.run_data import RunData
from kd_pipeline.workflows.student_outputs import StudentOutputs
from kd_pipeline.workflows.validation import StageEvaluator

__all__ = ["StageEvaluations"]


class StageEvaluations:
    """Evaluates the student of a stage by the built-in metrics, or by a function of the user's own."""

    def __init__(
        self,
        config: Config,
        data: RunData,
        student: StudentOutputs,
        *,
        reference: Teacher | None,
        validate_by: Validate | None,
        metrics: Sequence[MetricSettings | Metric],
    ) -> None:
        """Decide what is measured, and by what the best student is selected, which is then part of `config`.

        Args:
            config: of the run.
            data: of the run.
            student: what it returns.
            reference: the teacher for images of the splits for evaluation; None without one that can run on them.
            validate_by: the user's own function.
            metrics: further built-in metrics.

        Raises:
            ConfigError: what the config selects or stops by is not measured, or its images lack labels.
        """
        self._data, self._student, self._reference = data, student, reference
        self._evaluator: StageEvaluator | OwnEvaluator
        self._validated: _Validated | None = None
        if validate_by is not None:
            self.plan = EvaluationPlan.of_function(data.validated)
            self.config = select_best(config, config.stage, self.plan)
            self._evaluator = OwnEvaluator(validate_by, data.loader)
            return
        self.plan = EvaluationPlan.of(
            config,
            config.stage,
            labeled=data.labeled,
            masked=data.masked if student.may_be_of_pixels else (),
            has_reference=reference is not None,
            validated=data.validated,
            is_headless=student.is_headless,
        )
        self.config = select_best(config, config.stage, self.plan)
        self._evaluator = StageEvaluator(
            self.config,
            self.plan,
            data.evaluation_loader,
            metrics=metrics,
            reference=reference,
            is_headless=student.is_headless,
            view=data.view,
        )

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that the exported network is evaluated on."""
        tests = ("test",) if self._data.has_test else ()
        return tuple(dict.fromkeys((*self.plan.validated, *self.plan.probed, *tests)))

    @property
    def splits_of_training(self) -> list[str]:
        """Those that are evaluated on during the training too."""
        return [split for split in self.splits if split != "test"]

    @property
    def predictions(self) -> Mapping[str, Predictions]:
        """Of the last evaluation of each split."""
        return self._evaluator.predictions

    def validate(self, model: nn.Module, module: DistillModule) -> dict[str, Evaluation]:
        """Validate while training; the features are judged at the end of an epoch only."""
        trainer, settings = module.trainer, self.config.feature_probe
        epoch = trainer.current_epoch + 1
        with_probe = (
            settings is not None
            and trainer.is_last_batch
            and (epoch % settings.every == 0 or epoch == self.config.train.epochs)
        )
        splits = self.splits_of_training
        compare = self.config.train.compare_with_teacher
        found = self._evaluator.evaluate(
            model, module.distillation, splits, compare=compare, with_probe=with_probe, bar=progress_bar
        )
        self._validated = _Validated(trainer.global_step, with_probe, splits, found)
        return found

    def complete_after(self, step: int) -> dict[str, Evaluation] | None:
        """The last validation, if it was after this step and measured all that is known; None otherwise."""
        last = self._validated
        if last is None or last.step != step:
            return None
        lacks_teacher = self._reference is not None and not self.config.train.compare_with_teacher
        if not self.plan.is_own and lacks_teacher and not self._student.is_headless:
            return None
        return None if self.plan.probed and not last.with_probe else last.found

    def missing(self, student: nn.Module, distillation: Distillation, known: Collection[str]) -> dict[str, Evaluation]:
        """The metrics of the exported network on the splits that are not in `known`."""
        validated = self._validated.splits if known and self._validated is not None else ()
        missing = [split for split in self.splits if split not in (*known, *validated)]
        return self._evaluator.evaluate(student, distillation, missing, compare=True, with_probe=True)


@dataclass(frozen=True, slots=True)
class _Validated:
    """The results of the last validation."""

    step: int
    """Optimizer step after which it was."""
    with_probe: bool
    splits: Sequence[str]
    found: dict[str, Evaluation]
