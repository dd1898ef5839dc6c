"""The loss of a run: a weighted sum of named terms."""

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
from kd_pipeline.losses.ramp import value_at
from kd_pipeline.losses.settings import LOGITS, DistillSettings, TermSettings
from kd_pipeline.models.features import tapped

__all__ = ["DistillSettings", "Distillation", "LossTerms", "OwnLoss", "TermSettings"]

OwnLoss = Callable[[Tensor, KDBatch], Tensor]
"""A loss of the user's: the student's logits `[N, K]` and the batch in, a scalar out, its mean over the valid rows."""

_NEEDS_A_CLASS = {"dkd"}
"""Losses that also take the labels, and need one class for each image."""
_STUDENT = "the student's features (run it inside distillation.student_features)"
_TEACHER = "the batch's teacher outputs (give the loader the teacher)"


class LossTerms(NamedTuple):
    """The loss of a batch and what it is made of. Nothing in it has waited for the device."""

    total: Tensor
    """The sum of the terms, each times its weight; a scalar with a graph."""
    terms: dict[str, Tensor]
    """Each term without its weight, by name: `task`, `distill`, and the further ones as `feature_mse.layer3`."""
    weights: dict[str, float]
    """What each counts at this point of the run."""
    temperature: float | None
    """Of the term `distill` at this point of the run; None where it has none."""


class Distillation(nn.Module):
    """Computes the loss that `settings` describe, and holds the projectors, which are trained with the student.

    A term whose weight is 0 for the whole run is left out. Without a teacher, the loss is the cross-entropy with the
    labels alone, whatever the weights are.

        with distillation.student_features(student) as features:
            logits = student(batch.images)
        loss = distillation(logits, features, batch, epoch=epoch, epochs=10).total

    For a comparison of your own, pass a function as `loss`, or override `distill_loss` in a subclass.
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
        loss: OwnLoss | None = None,
        plugins: Collection[str] = (),
    ) -> None:
        """Check every name and shape on two images of zeros, and make the projectors.

        Args:
            settings: what to compute.
            student: `[N, *image_shape]` to logits `[N, num_classes]`. It is run once, in evaluation mode, and not kept.
            teacher_outputs: `Teacher.outputs`, or None to train on the labels alone.
            image_shape: channels, height and width of the images.
            num_classes: number of classes in the data.
            labels_are_soft: whether the labels are `[N, K]` weights, as mixing makes them.
            loss: takes the place of the one that the settings name.
            plugins: modules that a `loss` in the settings may come from. A config file is data and cannot allow this by
                itself: take them from what the user typed.

        Raises:
            ConfigError: a layer, an output or a function does not exist, shapes do not fit, or a loss needs one class
                for each image and the labels are mixed.
        """
        super().__init__()
        self.settings = settings
        has_teacher = teacher_outputs is not None
        distill_weight, task_weight = settings.weights if has_teacher else (0.0, 1.0)
        self._features = tuple(term for term in settings.features if has_teacher and term.weight != 0)
        weights = {
            "task": task_weight,
            "distill": distill_weight,
            **{term.name: term.weight for term in self._features},
        }
        self._weights = {name: weight for name, weight in weights.items() if weight != 0}
        self._own: OwnLoss | None = loss
        self._named: TermSettings | None = None
        if "distill" in self._weights and loss is None:
            if settings.names_a_function:
                self._own = import_function("loss", settings.loss, plugins, caller="Distillation")
            else:
                self._named = TermSettings(loss=settings.loss, options=settings.options)
        has_temperature = self._named is not None and self._named.has_temperature
        self._temperature = settings.temperature if has_temperature else None
        self.layers = tuple(dict.fromkeys(term.student for term in self._features if term.student != LOGITS))
        """Layers of the student whose outputs `forward` wants."""
        if labels_are_soft:
            self._refuse_soft_labels()
        outputs = _dry_run(student, self.layers, image_shape, num_classes)
        self.projectors = nn.ModuleList()
        """One for each further term; those that change nothing have no parameters."""
        if teacher_outputs is not None:
            self._fit(outputs, teacher_outputs, num_classes)

    def student_features(self, student: nn.Module) -> AbstractContextManager[Mapping[str, Tensor]]:
        """A `with` that collects, during one forward pass of `student`, the features which `forward` wants.

        It works for a student compiled by `torch.compile`, or in place, as `kd_pipeline.models.features.tapped` says.
        """
        return tapped(student, self.layers)

    def forward(
        self, logits: Tensor, features: Mapping[str, Tensor], batch: KDBatch, *, epoch: float, epochs: int
    ) -> LossTerms:
        """The loss of `batch` after `epoch` epochs, a fraction within one, of a run of `epochs`.

        Args:
            logits: the student's answer to the batch, `[N, K]`.
            features: the outputs of the student's layers in `layers`, by name.
            batch: its labels, valid rows and teacher's outputs.
            epoch: how much of the run is done.
            epochs: how long it is.

        Raises:
            ConfigError: the batch has no labels, or the teacher's or student's features are not there.
        """
        temperature = None if self._temperature is None else value_at(self._temperature, epoch, epochs)
        terms = {}
        if "task" in self._weights:
            smoothing = self.settings.label_smoothing
            terms["task"] = losses.task(logits, batch.labels, label_smoothing=smoothing, valid=batch.valid)
        if "distill" in self._weights:
            terms["distill"] = self.distill_loss(logits, features, batch, temperature)
        for term, projector in zip(self._features, self.projectors, strict=True):
            student = logits if term.student == LOGITS else _get(features, term.student, _STUDENT)
            teacher = _get(batch.teacher, term.teacher, _TEACHER)
            warmth = None if term.temperature is None else value_at(term.temperature, epoch, epochs)
            terms[term.name] = _compare(term, projector(student), teacher, batch.labels, batch.valid, warmth)
        weights = {name: value_at(self._weights[name], epoch, epochs) for name in terms}
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return LossTerms(total, terms, weights, temperature)

    def distill_loss(
        self, logits: Tensor, features: Mapping[str, Tensor], batch: KDBatch, temperature: float | None
    ) -> Tensor:
        """The term `distill`, a scalar: the mean over the valid rows of `batch`. Override it for a loss of your own.

        Args:
            logits: the student's, `[N, K]`.
            features: the outputs of the student's layers that the further terms name.
            batch: what the logits answer to.
            temperature: at this point of the run; None where the loss in the settings has none.
        """
        if self._named is not None:
            teacher = _get(batch.teacher, LOGITS, _TEACHER)
            return _compare(self._named, logits, teacher, batch.labels, batch.valid, temperature)
        assert self._own is not None
        value = self._own(logits, batch)
        if not isinstance(value, Tensor) or value.shape != ():
            found = list(value.shape) if isinstance(value, Tensor) else type(value).__qualname__
            raise ConfigError(f"the loss {self._own!r} should return a scalar tensor, got {found}; take the batch mean")
        return value

    def _refuse_soft_labels(self) -> None:
        terms = self._features if self._named is None else (self._named, *self._features)
        for term in terms:
            if term.loss in _NEEDS_A_CLASS:
                raise ConfigError(
                    f"the loss {term.loss} needs one class for each image, and mixing gives an image two; leave mixup "
                    "and cutmix out, or take another loss"
                )

    def _fit(self, outputs: Mapping[str, Tensor], teacher_outputs: Mapping[str, TensorSpec], num_classes: int) -> None:
        """Make the projectors, and try every term on zeros in place of the teacher's outputs."""
        spec = teacher_outputs[LOGITS]
        if spec.shape[1] not in (None, num_classes):
            raise ConfigError(
                f"the teacher answers with {spec.shape[1]} classes and the data has {num_classes}; take a teacher of "
                "the same classes, or the data that it knows"
            )
        if self._named is not None:
            _try("distill", self._named, outputs[LOGITS], spec)
        for term in self._features:
            if term.teacher not in teacher_outputs:
                raise ConfigError(
                    f"distill.features: {term.name}: the teacher has no output called {term.teacher!r}, "
                    "and a PyTorch teacher returns the layers that its features name"
                    f"{suggest(term.teacher, teacher_outputs)}"
                )
            student, spec = outputs[term.student], teacher_outputs[term.teacher]
            self.projectors.append(_projector(term, student, spec))
            with torch.no_grad():
                _try(f"distill.features: {term.name}", term, self.projectors[-1](student), spec)


def _dry_run(
    student: nn.Module, layers: Sequence[str], image_shape: tuple[int, int, int], num_classes: int
) -> dict[str, Tensor]:
    """What the student returns for two images of zeros, `logits` and the layers; it stays in the modes it was in."""
    name = type(student).__qualname__
    anywhere = next(student.parameters(), torch.zeros(()))
    zeros = torch.zeros(2, *image_shape, dtype=anywhere.dtype, device=anywhere.device)
    modes = [(module, module.training) for module in student.modules()]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), tapped(student, layers) as features:
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
            f"the student {name} should give logits [2, {num_classes}] for 2 images of {num_classes} classes, got "
            f"{found}; set its num_classes"
        )
    return {LOGITS: logits, **features}


def _projector(term: TermSettings, student: Tensor, teacher: TensorSpec) -> nn.Module:
    """From the student's features to the number of channels of the teacher's."""
    kind: dict[str, Any] = {"device": student.device, "dtype": student.dtype}
    ndims = student.ndim, len(teacher.shape)
    match term.projector:
        case "none":
            return nn.Identity()
        case "conv":
            wanted = "maps [N, C, H, W]"
            if ndims == (4, 4) and teacher.shape[1] is not None:
                return nn.Conv2d(student.shape[1], teacher.shape[1], 1, **kind)
        case "linear":
            wanted = "embeddings [N, D] or tokens [N, L, D]"
            if ndims in ((2, 2), (3, 3)) and teacher.shape[-1] is not None:
                return nn.Linear(student.shape[-1], teacher.shape[-1], **kind)
    raise ConfigError(
        f"distill.features: {term.name}: projector: {term.projector} takes {wanted} of a known C or D, the student's "
        f"{term.student!r} is {list(student.shape)} and the teacher's {term.teacher!r} {teacher}; take another "
        "projector or other layers"
    )


def _try(place: str, term: TermSettings, student: Tensor, teacher: TensorSpec) -> None:
    """Compute the term once, so that what does not fit is said now and not at the first batch."""
    sizes = [size for size in teacher.shape[1:] if size is not None]
    if len(sizes) < len(teacher.shape) - 1:
        return
    zeros = student.new_zeros(len(student), *sizes)
    labels = torch.zeros(len(student), dtype=torch.int64, device=student.device)
    try:
        _compare(term, student, zeros, labels, None, None)
    except ConfigError as exc:
        raise ConfigError(f"{place}: {exc}") from exc


def _compare(
    term: TermSettings,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    valid: Tensor | None,
    temperature: float | None,
) -> Tensor:
    arguments: dict[str, Any] = {**term.options, "valid": valid}
    if temperature is not None:
        arguments["temperature"] = temperature
    if term.loss in _NEEDS_A_CLASS:
        arguments["labels"] = labels
    value: Tensor = getattr(losses, term.loss)(student, teacher, **arguments)
    return value


def _get(tensors: Mapping[str, Tensor], name: str, owner: str) -> Tensor:
    if name not in tensors:
        found = ", ".join(map(repr, tensors)) or "nothing"
        raise ConfigError(f"the loss needs {name!r} among {owner}, and found {found}")
    return tensors[name]
