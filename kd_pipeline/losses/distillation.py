"""The training loss: a weighted sum of named terms, with their projectors."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_pipeline import losses
from kd_pipeline._core.plugins import import_function
from kd_pipeline._core.suggestions import suggest
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.ramp import max_value, value_at
from kd_pipeline.losses.settings import LOGITS, DistillSettings, TermSettings
from kd_pipeline.models.features import capture_features

__all__ = ["CustomLoss", "DistillSettings", "Distillation", "LossTerms", "TermSettings"]

CustomLoss = Callable[[Tensor, KDBatch], Tensor]
"""Your own loss: maps the student's logits `[N, K]` and the batch to a scalar, the mean over the valid rows."""

_LOSSES_WITH_LABELS = {"dkd"}
"""Losses that need the class of each image besides the teacher's logits."""
_STUDENT = "the student's features (run it inside distillation.student_features)"
_TEACHER = "the batch's teacher outputs (give the loader the teacher)"


class LossTerms(NamedTuple):
    """The loss of a batch and its terms, on the device of the batch."""

    total: Tensor
    """Weighted sum of the terms, a scalar with a graph."""
    terms: dict[str, Tensor]
    """Unweighted terms by name: `task`, `distill` and extra terms such as `feature_mse.layer3`."""
    weights: dict[str, float]
    """Current weight of each term."""
    temperature: float | None
    """Current temperature of the term `distill`; None if it has none."""


class Distillation(nn.Module):
    """The training loss that `settings` describe, with its projectors, which are trained with the student.

        with distillation.student_features(student) as features:
            logits = student(batch.images)
        loss = distillation(logits, features, batch, epoch=epoch, epochs=10).total

    Terms with a weight of 0 for the whole run are not computed. Without a teacher the loss is the cross-entropy with
    the labels, with weight 1. For a loss of your own, pass `loss` or override `distill_loss`.
    """

    def __init__(
        self,
        settings: DistillSettings,
        *,
        student: nn.Module,
        teacher_outputs: Mapping[str, TensorSpec] | None,
        image_shape: tuple[int, int, int],
        num_classes: int,
        labels_are_soft: bool = False,
        loss: CustomLoss | None = None,
        plugins: Collection[str] = (),
    ) -> None:
        """Build the projectors, and check all names and shapes with a dry run on zeros.

        Args:
            settings: the terms and their weights.
            student: maps `[N, *image_shape]` to logits `[N, num_classes]`. It runs once, in eval mode, and is not kept.
            teacher_outputs: `Teacher.outputs`, or None to train on labels only.
            image_shape: `(C, H, W)` of the images.
            num_classes: number of classes in the data.
            labels_are_soft: whether labels are `[N, K]` weights, as with mixup and cutmix.
            loss: replaces the loss named in the settings; the weights stay theirs.
            plugins: modules that a `loss` in the settings may come from. A config file is data and cannot grant this
                itself: pass what the user typed.

        Raises:
            ConfigError: a layer, an output or a function does not exist, shapes do not match, or a loss needs the class
                of each image and labels are soft.
        """
        super().__init__()
        self.settings = settings
        has_teacher = teacher_outputs is not None
        distill_weight, task_weight = settings.weights if has_teacher else (0.0, 1.0)
        self._extra_terms = tuple(term for term in settings.features if has_teacher and max_value(term.weight))
        weights = {"task": task_weight, "distill": distill_weight}
        weights |= {term.name: term.weight for term in self._extra_terms}
        self._weights = {name: weight for name, weight in weights.items() if max_value(weight)}
        self._custom_loss: CustomLoss | None = loss
        self._distill_term: TermSettings | None = None
        if "distill" in self._weights and loss is None:
            if settings.has_custom_loss:
                self._custom_loss = import_function("loss", settings.loss, plugins)
            else:
                self._distill_term = TermSettings(
                    loss=settings.loss, temperature=settings.temperature, options=settings.options
                )
        self._temperature = None if self._distill_term is None else self._distill_term.temperature
        self.layers = tuple(dict.fromkeys(term.student for term in self._extra_terms if term.student != LOGITS))
        """Layers of the student whose features `forward` needs."""
        if labels_are_soft:
            self._check_soft_labels()
        outputs = _dry_run(student, self.layers, image_shape, num_classes)
        self.projectors = nn.ModuleList()
        """One per extra term; `nn.Identity` for a term without a projector."""
        if teacher_outputs is not None:
            self._build_projectors(outputs, teacher_outputs, num_classes)

    def student_features(self, student: nn.Module) -> AbstractContextManager[Mapping[str, Tensor]]:
        """A context that captures the features that `forward` needs in one forward pass of `student`.

        The student may be compiled, as `kd_pipeline.models.features.capture_features` describes.
        """
        return capture_features(student, self.layers)

    def forward(
        self, logits: Tensor, features: Mapping[str, Tensor], batch: KDBatch, *, epoch: float, epochs: int
    ) -> LossTerms:
        """The loss of a batch.

        Args:
            logits: the student's, `[N, K]`.
            features: outputs of the student's `layers`, by name.
            batch: labels, valid rows and teacher outputs.
            epoch: epochs done so far, fractional within an epoch.
            epochs: length of the run.

        Raises:
            ConfigError: the batch has no labels, or features of the student or the teacher are missing.
        """
        temperature = None if self._temperature is None else value_at(self._temperature, epoch, epochs)
        terms = {}
        if "task" in self._weights:
            smoothing = self.settings.label_smoothing
            terms["task"] = losses.task(logits, batch.labels, label_smoothing=smoothing, valid=batch.valid)
        if "distill" in self._weights:
            terms["distill"] = self.distill_loss(logits, features, batch, temperature)
        for term, projector in zip(self._extra_terms, self.projectors, strict=True):
            student = logits if term.student == LOGITS else _get(features, term.student, _STUDENT)
            teacher = _get(batch.teacher, term.teacher, _TEACHER)
            term_temperature = None if term.temperature is None else value_at(term.temperature, epoch, epochs)
            terms[term.name] = _compute(
                term, projector(student), teacher, batch.labels, valid=batch.valid, temperature=term_temperature
            )
        weights = {name: value_at(self._weights[name], epoch, epochs) for name in terms}
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return LossTerms(total, terms, weights, temperature)

    def distill_loss(
        self, logits: Tensor, features: Mapping[str, Tensor], batch: KDBatch, temperature: float | None
    ) -> Tensor:
        """The term `distill`, a scalar: the mean over the valid rows. Override it for a loss of your own.

        Args:
            logits: the student's, `[N, K]`.
            features: outputs of the student's `layers`, by name.
            batch: the batch of the logits.
            temperature: current temperature; None if the loss in the settings has none.
        """
        if self._distill_term is not None:
            teacher = _get(batch.teacher, LOGITS, _TEACHER)
            return _compute(
                self._distill_term, logits, teacher, batch.labels, valid=batch.valid, temperature=temperature
            )
        assert self._custom_loss is not None
        value = self._custom_loss(logits, batch)
        if not isinstance(value, Tensor) or value.shape != ():
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__qualname__
            raise ConfigError(
                f"the loss {self._custom_loss!r} should return a scalar tensor, got {found}; take the batch mean"
            )
        return value

    def _check_soft_labels(self) -> None:
        terms = self._extra_terms if self._distill_term is None else (self._distill_term, *self._extra_terms)
        for term in terms:
            if term.loss in _LOSSES_WITH_LABELS:
                raise ConfigError(
                    f"the loss {term.loss} needs one class per image, and mixing gives an image two; disable mixup and "
                    "cutmix, or choose another loss"
                )

    def _build_projectors(
        self, outputs: Mapping[str, Tensor], teacher_outputs: Mapping[str, TensorSpec], num_classes: int
    ) -> None:
        """Build the projectors, and compute every term on zeros in place of the teacher's outputs."""
        spec = teacher_outputs[LOGITS]
        if spec.shape[1] not in (None, num_classes):
            raise ConfigError(
                f"the teacher has {spec.shape[1]} classes and the data has {num_classes}; use a teacher and data with "
                "the same classes"
            )
        if self._distill_term is not None:
            _check_term("distill", self._distill_term, outputs[LOGITS], spec)
        for term in self._extra_terms:
            if term.teacher not in teacher_outputs:
                raise ConfigError(
                    f"distill.features: {term.name}: the teacher has no output called {term.teacher!r}; a PyTorch "
                    f"teacher returns the layers listed in its features{suggest(term.teacher, teacher_outputs)}"
                )
            student, spec = outputs[term.student], teacher_outputs[term.teacher]
            self.projectors.append(_projector(term, student, spec))
            with torch.no_grad():
                _check_term(f"distill.features: {term.name}", term, self.projectors[-1](student), spec)


def _dry_run(
    student: nn.Module, layers: Sequence[str], image_shape: tuple[int, int, int], num_classes: int
) -> dict[str, Tensor]:
    """The student's logits and features for two images of zeros; its train and eval modes are unchanged."""
    name = type(student).__qualname__
    like = next(student.parameters(), torch.zeros(()))
    zeros = torch.zeros(2, *image_shape, dtype=like.dtype, device=like.device)
    modes = [(module, module.training) for module in student.modules()]
    try:
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            capture_features(student, layers) as features,
        ):
            logits = student.eval()(zeros)
    except ConfigError:
        raise
    except Exception as exc:
        raise ConfigError(f"the student {name} fails on zeros {list(zeros.shape)}: {exc}") from exc
    finally:
        for module, mode in modes:
            module.training = mode
    found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__qualname__
    if found != [2, num_classes]:
        raise ConfigError(
            f"the student {name} should return logits [2, {num_classes}] for 2 images of {num_classes} classes, got "
            f"{found}; set its num_classes"
        )
    return {LOGITS: logits, **features}


def _projector(term: TermSettings, student: Tensor, teacher: TensorSpec) -> nn.Module:
    """Maps the student's features to the teacher's number of channels."""
    like: dict[str, Any] = {"device": student.device, "dtype": student.dtype}
    ndims = student.ndim, len(teacher.shape)
    match term.projector:
        case "none":
            return nn.Identity()
        case "conv":
            expected = "maps [N, C, H, W]"
            if ndims == (4, 4) and teacher.shape[1] is not None:
                return nn.Conv2d(student.shape[1], teacher.shape[1], 1, **like)
        case "linear":
            expected = "embeddings [N, D] or tokens [N, L, D]"
            if ndims in ((2, 2), (3, 3)) and teacher.shape[-1] is not None:
                return nn.Linear(student.shape[-1], teacher.shape[-1], **like)
    raise ConfigError(
        f"distill.features: {term.name}: projector: {term.projector} takes {expected} with a known C or D; the "
        f"student's {term.student!r} is {list(student.shape)} and the teacher's {term.teacher!r} {teacher}; choose "
        "another projector or other layers"
    )


def _check_term(place: str, term: TermSettings, student: Tensor, teacher: TensorSpec) -> None:
    """Compute the term on zeros, to report what does not fit before training; not if the teacher's shape is open."""
    sizes = [size for size in teacher.shape[1:] if size is not None]
    if len(sizes) < len(teacher.shape) - 1:
        return
    zeros = student.new_zeros(len(student), *sizes)
    labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
    try:
        _compute(term, student, zeros, labels)
    except ConfigError as exc:
        raise ConfigError(f"{place}: {exc}") from exc


def _compute(
    term: TermSettings,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    *,
    valid: Tensor | None = None,
    temperature: float | None = None,
) -> Tensor:
    """The value of a term; without a `temperature`, at the default of its loss."""
    arguments: dict[str, Any] = {**term.options, "valid": valid}
    if temperature is not None:
        arguments["temperature"] = temperature
    if term.loss in _LOSSES_WITH_LABELS:
        arguments["labels"] = labels
    value: Tensor = getattr(losses, term.loss)(student, teacher, **arguments)
    return value


def _get(tensors: Mapping[str, Tensor], name: str, owner: str) -> Tensor:
    if name not in tensors:
        found = ", ".join(map(repr, tensors)) or "nothing"
        raise ConfigError(f"the loss needs {name!r} among {owner}, and found {found}")
    return tensors[name]
