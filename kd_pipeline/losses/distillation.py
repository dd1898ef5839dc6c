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
from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.losses.ramp import max_value, value_at
from kd_pipeline.losses.settings import LOGITS, DistillSettings, TermSettings
from kd_pipeline.models.features import capture_features
from kd_pipeline.models.modules import named_outputs

__all__ = ["CustomLoss", "DistillSettings", "Distillation", "LossTerms", "TermSettings", "student_outputs"]

CustomLoss = Callable[[Any, KDBatch], Tensor]
"""Your own loss: maps what the student returns, such as logits `[N, K]`, and the batch to a scalar, the mean over the
valid rows."""

_LOSSES_WITH_LABELS = {"dkd"}
"""Losses that need the class of each image besides the teacher's logits."""
_STUDENT = "the student's outputs and features (run it inside distillation.student_features)"
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
        num_classes: int | None,
        labels_are_soft: bool = False,
        loss: CustomLoss | None = None,
        plugins: Collection[str] = (),
    ) -> None:
        """Build the projectors, and check all names and shapes with a dry run on zeros.

        Args:
            settings: the terms and their weights.
            student: maps `[N, *image_shape]` to logits `[N, num_classes]`, or to outputs by name. It runs once, in eval
                mode, and is not kept.
            teacher_outputs: `Teacher.outputs`, or None to train on labels only.
            image_shape: `(C, H, W)` of the images.
            num_classes: number of classes in the data; None if it has none.
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
            assert settings.loss is not None  # without one the weight is 0
            if settings.has_custom_loss:
                self._custom_loss = import_function("loss", settings.loss, plugins)
            else:
                self._distill_term = TermSettings(
                    loss=settings.loss, temperature=settings.temperature, options=settings.options
                )
        self._temperature = None if self._distill_term is None else self._distill_term.temperature
        if labels_are_soft:
            self._check_soft_labels()
        own = _run_on_zeros(student, (), image_shape)
        needs_logits = {"task", "distill"} & self._weights.keys()
        if LOGITS in own or needs_logits:
            _check_logits(student, own, num_classes, needed_by=sorted(needs_logits))
        self.layers = tuple(dict.fromkeys(term.student for term in self._extra_terms if term.student not in own))
        """Layers of the student whose features `forward` needs besides what the student returns."""
        outputs = own | _run_on_zeros(student, self.layers, image_shape) if self.layers else own
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
        self,
        outputs: Tensor | Mapping[str, Tensor],
        features: Mapping[str, Tensor],
        batch: KDBatch,
        *,
        epoch: float,
        epochs: int,
    ) -> LossTerms:
        """The loss of a batch.

        Args:
            outputs: what the student returns: logits `[N, K]`, or outputs by name.
            features: outputs of the student's `layers`, by name.
            batch: labels, valid rows and teacher outputs.
            epoch: epochs done so far, fractional within an epoch.
            epochs: length of the run.

        Raises:
            ConfigError: the batch has no labels, or features of the student or the teacher are missing.
        """
        temperature = None if self._temperature is None else value_at(self._temperature, epoch, epochs)
        found = {**student_outputs(outputs), **features}
        terms = {}
        if "task" in self._weights:
            logits = _get(found, LOGITS, _STUDENT)
            smoothing = self.settings.label_smoothing
            terms["task"] = losses.task(logits, batch.labels, label_smoothing=smoothing, valid=batch.valid)
        if "distill" in self._weights:
            terms["distill"] = self.distill_loss(outputs, features, batch, temperature)
        for term, projector in zip(self._extra_terms, self.projectors, strict=True):
            student = _get(found, term.student, _STUDENT)
            teacher = _get(batch.teacher, term.teacher, _TEACHER)
            term_temperature = None if term.temperature is None else value_at(term.temperature, epoch, epochs)
            terms[term.name] = _compute(
                term, projector(student), teacher, batch.labels, valid=batch.valid, temperature=term_temperature
            )
        weights = {name: value_at(self._weights[name], epoch, epochs) for name in terms}
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return LossTerms(total, terms, weights, temperature)

    def distill_loss(
        self,
        outputs: Tensor | Mapping[str, Tensor],
        features: Mapping[str, Tensor],
        batch: KDBatch,
        temperature: float | None,
    ) -> Tensor:
        """The term `distill`, a scalar: the mean over the valid rows. Override it for a loss of your own.

        Args:
            outputs: what the student returns: logits `[N, K]`, or outputs by name.
            features: outputs of the student's `layers`, by name.
            batch: the batch of the outputs.
            temperature: current temperature; None if the loss in the settings has none.
        """
        if self._distill_term is not None:
            logits, teacher = _get(student_outputs(outputs), LOGITS, _STUDENT), _get(batch.teacher, LOGITS, _TEACHER)
            return _compute(
                self._distill_term, logits, teacher, batch.labels, valid=batch.valid, temperature=temperature
            )
        assert self._custom_loss is not None
        value = self._custom_loss(outputs, batch)
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
        self, outputs: Mapping[str, Tensor], teacher_outputs: Mapping[str, TensorSpec], num_classes: int | None
    ) -> None:
        """Build the projectors, and compute every term on zeros in place of the teacher's outputs."""
        logits = teacher_outputs.get(LOGITS)
        if logits is None and "distill" in self._weights and self._custom_loss is None:
            raise ConfigError(
                f"distill.loss: {self.settings.loss} compares logits, and the teacher returns "
                f"{', '.join(map(repr, teacher_outputs))}; set distill.loss: null, and distill.features to what is to "
                "be compared"
            )
        if logits is not None and LOGITS in outputs and logits.shape[1] not in (None, num_classes):
            raise ConfigError(
                f"the teacher has {logits.shape[1]} classes and the data has {num_classes}; use a teacher and data "
                "with the same classes"
            )
        if self._distill_term is not None:
            assert logits is not None
            _check_term("distill", self._distill_term, outputs[LOGITS], logits)
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


def student_outputs(outputs: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What a student returns, by name.

    Raises:
        ConfigError: it is neither a tensor nor a mapping of tensors.
    """
    try:
        return named_outputs(outputs, owner="a student")
    except TeacherError as exc:
        raise ConfigError(str(exc)) from None


def _run_on_zeros(student: nn.Module, layers: Sequence[str], image_shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """The student's outputs, or the features of `layers`, for two images of zeros; its modes are unchanged."""
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
            outputs = student.eval()(zeros)
        return dict(features) if layers else dict(student_outputs(outputs))
    except ConfigError:
        raise
    except Exception as exc:
        raise ConfigError(f"the student {name} fails on zeros {list(zeros.shape)}: {exc}") from exc
    finally:
        for module, mode in modes:
            module.training = mode


def _check_logits(
    student: nn.Module, outputs: Mapping[str, Tensor], num_classes: int | None, *, needed_by: Sequence[str]
) -> None:
    """Raise a ConfigError if the logits lack, or have another number of classes than the data."""
    name = type(student).__qualname__
    if LOGITS not in outputs:
        found = ", ".join(f"{key!r} {list(output.shape)}" for key, output in outputs.items())
        raise ConfigError(
            f"the student {name} returns {found}, and no logits, which {' and '.join(needed_by)} compares: give it a "
            "head with num_classes, or set distill.loss: null and distill.features to what is to be compared"
        )
    found_shape = list(outputs[LOGITS].shape)
    if num_classes is not None and found_shape != [2, num_classes]:
        raise ConfigError(
            f"the student {name} should return logits [2, {num_classes}] for 2 images of {num_classes} classes, got "
            f"{found_shape}; set its num_classes"
        )


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
