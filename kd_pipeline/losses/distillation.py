"""The training loss: a weighted sum of named terms, with their projectors."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kd_pipeline._core.constants import IGNORE_INDEX
from kd_pipeline._core.plugins import import_function
from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.batch import KDBatch
from kd_pipeline.errors import ConfigError
from kd_pipeline.losses.compiled import CompiledLosses, LossFunctions, loss_by_name
from kd_pipeline.losses.dry_run import check_logits, run_dry
from kd_pipeline.losses.outputs import find_output, is_alias
from kd_pipeline.losses.pixels import PixelLabels
from kd_pipeline.losses.ramp import Ramp, max_value, value_at
from kd_pipeline.losses.resize import Resizer
from kd_pipeline.losses.returned import check_returned_losses, returned_losses, student_outputs
from kd_pipeline.losses.settings import LOGITS, DistillSettings, TermSettings
from kd_pipeline.losses.terms import NEED_LABELS, Term, TermModules, check_on_zeros, compute_loss, settle_term
from kd_pipeline.models.backbone import prefix_tokens_of, trunk_of
from kd_pipeline.models.features import capture_features
from kd_pipeline.models.modules import deployed_network, zero_images

__all__ = [
    "CustomLoss",
    "DistillSettings",
    "Distillation",
    "LossTerms",
    "TermSettings",
    "scalar_loss",
    "student_outputs",
]

CustomLoss = Callable[[Any, KDBatch], Tensor]
"""Your own loss, or one of its terms: maps what the student returns, as it returns it, and the batch to a scalar, the
mean over the valid rows."""

_STUDENT = "the student's outputs and features (run it inside distillation.student_features)"
_TEACHER = "the batch's teacher outputs (give the loader the teacher)"


class LossTerms(NamedTuple):
    """The loss of a batch and its terms, on the device of the batch."""

    total: Tensor
    """Weighted sum of the terms, a scalar with a graph."""
    terms: dict[str, Tensor]
    """Unweighted terms by name: `task`, `distill` and extra terms such as `feature_mse.layer3` and `task.aux`."""
    weights: dict[str, float]
    """Current weight of each term."""
    temperature: float | None
    """Current temperature of the term `distill`; None if it has none."""

    @property
    def shares(self) -> dict[str, Tensor]:
        """The balance: weight · term / total of each term, without a graph; 0 where the total is 0."""
        total = self.total.detach()
        return {
            name: (self.weights[name] * value.detach() / total).where(total != 0, 0.0)
            for name, value in self.terms.items()
        }


class Distillation(nn.Module):
    """The training loss that `settings` describe, with its projectors, which are trained with the student.

        with distillation.student_features(student) as features:
            logits = student(batch.images)
        loss = distillation(logits, features, batch, epoch=epoch, epochs=10).total

    In training mode terms with `standardize` or a queue learn from the teacher's features too, on all ranks together.

    Losses that the student returns are terms too, with their weights in the settings; in eval mode it may return none.

    Terms with a weight of 0 for the whole run are not computed. Without a teacher the loss is the cross-entropy with
    the labels, with weight 1. For a loss of your own, pass `loss` or override `distill_loss`; for a task that is not
    the cross-entropy with the labels, pass `task_loss` or override the method `task_loss`.
    """

    def __init__(
        self,
        settings: DistillSettings,
        *,
        student: nn.Module,
        teacher_outputs: Mapping[str, TensorSpec] | None,
        image_shape: Sequence[int] | None = None,
        example: Mapping[str, Tensor] | None = None,
        num_classes: int | None,
        labels_are_soft: bool = False,
        loss: CustomLoss | None = None,
        task_loss: CustomLoss | None = None,
        ignore_index: int = IGNORE_INDEX,
        plugins: Collection[str] = (),
    ) -> None:
        """Build the projectors, and settle all names and shapes with a dry run.

        Args:
            settings: the terms and their weights.
            student: maps its inputs to logits `[N, num_classes]`, or to what `named_outputs` describes; one for
                segmentation to `{"logits": [N, num_classes, h, w]}`. It runs in eval mode, and is not kept.
            teacher_outputs: `Teacher.outputs`, or None to train on labels only.
            image_shape: shape of one input, such as `(C, H, W)` of images, for a dry run on zeros.
            example: inputs of two rows by name, for the dry run of a student that takes something else.
            num_classes: number of classes in the data; None if it has none.
            labels_are_soft: whether labels are `[N, K]` weights, as with mixup and cutmix.
            loss: replaces the loss named in the settings; the weights stay theirs, without a teacher too.
            task_loss: replaces the cross-entropy with the labels, or the `task_loss` in the settings.
            ignore_index: class in `batch.masks` of the pixels that have none.
            plugins: modules that a `loss` or `task_loss` in the settings may come from. A config file is data and
                cannot grant this itself: pass what the user typed.

        Raises:
            ConfigError: a layer, an output or a function does not exist, features cannot be compared, a loss of the
                student has no weight, or a loss needs the class of each image and labels are soft.
            TypeError: neither `image_shape` nor `example` is given.
        """
        super().__init__()
        if example is None:
            if image_shape is None:
                raise TypeError("a Distillation needs an example of the inputs, or image_shape, the shape of one")
            example = zero_images(image_shape)
        self.settings = settings
        self._ignore_index = ignore_index
        self._resize = Resizer("bilinear")
        self._compiled: CompiledLosses | None = None
        self._logit_term: Term | None = None
        """How maps of logits meet those of the teacher in the term `distill`."""
        has_teacher = teacher_outputs is not None
        self._is_own_loss = loss is not None or type(self).distill_loss is not Distillation.distill_loss
        uses_settings = has_teacher or self._is_own_loss or (settings.loss is None and settings.student_losses)
        distill_weight, task_weight = settings.weights if uses_settings else (0.0, 1.0)
        extra = {
            name: term
            for name, term in zip(settings.term_names, settings.features, strict=True)
            if has_teacher and max_value(term.weight)
        }
        weights = {"task": task_weight, "distill": distill_weight}
        weights |= {name: term.weight for name, term in extra.items()} | settings.student_losses
        weights |= {f"task.{name}": weight for name, weight in settings.heads.items()}
        self._weights = {name: weight for name, weight in weights.items() if max_value(weight)}
        self._custom_loss: CustomLoss | None = loss
        self._distill_term: TermSettings | None = None
        if "distill" in self._weights and loss is None:
            assert settings.loss is not None  # without one the weight is 0
            if settings.has_custom_loss:
                self._custom_loss, self._is_own_loss = import_function("loss", settings.loss, plugins), True
            else:
                self._distill_term = TermSettings(
                    loss=settings.loss,
                    temperature=settings.temperature,
                    options=settings.options,
                    skip_ignored=settings.skip_ignored,
                    projector="none",
                    grid="smaller",
                )
        if task_loss is None and settings.task_loss is not None and "task" in self._weights:
            task_loss = import_function("distill.task_loss", settings.task_loss, plugins)
        self._custom_task = task_loss
        self._is_own_task = task_loss is not None or type(self).task_loss is not Distillation.task_loss
        self._temperature = None if self._distill_term is None else self._distill_term.temperature
        if labels_are_soft:
            _check_soft_labels([*extra.values()] + ([self._distill_term] if self._distill_term else []))
        run = run_dry(student, (), example)
        if run.losses:  # which a student may return in training mode only
            check_returned_losses(run.losses, settings.student_losses)
        own = run.outputs
        owned = {"task": self._is_own_task, "distill": self._is_own_loss}
        needs_logits = {name for name, is_own in owned.items() if not is_own and name in self._weights}
        if needs_logits or (LOGITS in own and own[LOGITS].ndim in (2, 4)):
            num_rows = len(next(iter(example.values())))
            check_logits(student, own, num_classes, num_rows=num_rows, needed_by=sorted(needs_logits))
        names = {name: _student_name(name, term, student, own) for name, term in extra.items()}
        self.layers = tuple(dict.fromkeys(name for name in names.values() if name not in own))
        """Layers of the student whose features `forward` needs besides what the student returns."""
        outputs = own | run_dry(student, self.layers, example).features if self.layers else own
        self.projectors = nn.ModuleList()
        """One per extra term; `nn.Identity` for a term without a projector."""
        self.standardizers, self.queues = nn.ModuleDict(), nn.ModuleDict()
        """Those of the extra terms that have one, by their number."""
        self._terms: tuple[Term, ...] = ()
        if teacher_outputs is not None:
            self._check_teacher_logits(outputs.get(LOGITS), teacher_outputs, num_classes)
            prefix = prefix_tokens_of(deployed_network(student), outputs)
            if all(each.ndim != 4 for each in example.values()):
                # Without images all of a sequence is compared, and none of it is guessed to be a class token.
                prefix = {key: number or 0 for key, number in prefix.items()}
                teacher_outputs = {
                    key: replace(spec, num_prefix_tokens=spec.num_prefix_tokens or 0)
                    for key, spec in teacher_outputs.items()
                }
            for name, term in extra.items():
                own_name = names[name]
                self._add(*settle_term(name, term, own_name, outputs[own_name], prefix[own_name], teacher_outputs))

    @property
    def compares_outputs(self) -> bool:
        """Whether something that the student returns enters the loss, and not layers of it alone."""
        on_outputs = {*self.settings.task_names, "distill", *self.settings.student_losses} & self._weights.keys()
        return bool(on_outputs) or any(term.student not in self.layers for term in self._terms)

    @property
    def student_grids(self) -> dict[str, tuple[int, int]]:
        """Height and width of the student's features that an output of the teacher is compared with, by its name.

        The larger of several; 1 x 1 for a vector. Outputs whose grid of the student is unknown are left out.
        """
        grids: dict[str, tuple[int, int]] = {}
        for term in self._terms:
            if (grid := term.meeting.student_grid) is not None:
                height, width = grids.get(term.teacher, (1, 1))
                grids[term.teacher] = max(height, grid[0]), max(width, grid[1])
        return grids

    def pixels(self, masks: Tensor) -> PixelLabels:
        """What masks `[N, H, W]` say, of which pixels with the ignore index count nowhere."""
        return PixelLabels(masks, self._ignore_index)

    def compile_losses(self) -> None:
        """Run the losses of this package by `torch.compile` in training mode, each for its first batch size."""
        self._compiled = CompiledLosses()

    def student_features(self, student: nn.Module) -> AbstractContextManager[Mapping[str, Tensor]]:
        """A context that captures the features that `forward` needs in one forward pass of `student`.

        The student may be compiled, as `kd_pipeline.models.features.capture_features` describes.
        """
        return capture_features(deployed_network(student), self.layers)

    def forward(
        self,
        outputs: Any,
        features: Mapping[str, Tensor],
        batch: KDBatch,
        *,
        epoch: float,
        epochs: int,
    ) -> LossTerms:
        """The loss of a batch.

        Args:
            outputs: what the student returns: logits `[N, K]`, or what `named_outputs` describes.
            features: outputs of the student's `layers`, by name.
            batch: labels, valid rows and teacher outputs.
            epoch: epochs done so far, fractional within an epoch.
            epochs: length of the run.

        Raises:
            ConfigError: the batch has no labels or masks, or features of the student or the teacher, or losses of the
                student, are missing.
        """
        temperature = None if self._temperature is None else value_at(self._temperature, epoch, epochs)
        found, own_losses = {**student_outputs(outputs), **features}, returned_losses(outputs)
        if self.training or own_losses:
            check_returned_losses(own_losses, self.settings.student_losses)
        terms = {}
        if "task" in self._weights:
            terms["task"] = self.task_loss(outputs, batch)
        if "distill" in self._weights:
            terms["distill"] = self.distill_loss(outputs, features, batch, temperature)
        for term, modules in self._term_modules():
            student, teacher = _get(found, term.student, _STUDENT), _get(batch.teacher, term.teacher, _TEACHER)
            ramp = term.settings.temperature
            terms[term.name] = modules.compute(
                term,
                student,
                teacher,
                batch.labels,
                valid=batch.valid,
                temperature=None if ramp is None else value_at(ramp, epoch, epochs),
                pixels=self._pixels_of(batch),
                functions=self._functions(ramp),
            )
        for name in self._heads:
            if name in found or self.training:  # a student may have heads for the training alone
                terms[f"task.{name}"] = self._cross_entropy(_get(found, name, _STUDENT), batch)
        terms |= {name: value for name, value in own_losses.items() if name in self._weights}
        weights = {name: value_at(self._weights[name], epoch, epochs) for name in terms}
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return LossTerms(total, terms, weights, temperature)

    def compared(self, outputs: Any, features: Mapping[str, Tensor]) -> list[Tensor]:
        """What of the student enters the loss; a loss of the user's own may take all that the student returns.

        Raises:
            ConfigError: features of the student are missing.
        """
        own, own_losses = student_outputs(outputs), returned_losses(outputs)
        on_logits = [LOGITS] if {"task", "distill"} & self._weights.keys() else []
        takes_all = self._is_own_loss or (self._is_own_task and "task" in self._weights)
        names = [*own] if takes_all else on_logits
        names += [term.student for term in self._terms] + [name for name in self._heads if name in own]
        compared = [_get({**own, **features}, name, _STUDENT) for name in dict.fromkeys(names)]
        return compared + [value for name, value in own_losses.items() if name in self._weights]

    def cosines(self, outputs: Any, features: Mapping[str, Tensor], batch: KDBatch) -> dict[str, Tensor]:
        """How close the student is to the teacher: the cosine of what each extra term compares, by its name.

        It is taken after projector, resizing and standardization, mean over the positions of a map or tokens, `[N]`
        float32 without a graph; rows that are not valid may hold anything. A term whose loss compares features of
        different widths has none. Nothing is learned from the batch, in training mode either.

        Raises:
            ConfigError: features of the student or the teacher are missing.
        """
        found = {**student_outputs(outputs), **features}
        cosines = {}
        for term, modules in self._term_modules():
            student, teacher = _get(found, term.student, _STUDENT), _get(batch.teacher, term.teacher, _TEACHER)
            cosine_N = modules.cosine(term, student, teacher)
            if cosine_N is not None:
                cosines[term.name] = cosine_N
        return cosines

    def distill_loss(
        self,
        outputs: Any,
        features: Mapping[str, Tensor],
        batch: KDBatch,
        temperature: float | None,
    ) -> Tensor:
        """The term `distill`, a scalar: the mean over the valid rows. Override it for a loss of your own.

        Args:
            outputs: what the student returns: logits `[N, K]`, or what `named_outputs` describes.
            features: outputs of the student's `layers`, by name.
            batch: the batch of the outputs.
            temperature: current temperature; None if the loss in the settings has none.
        """
        if self._distill_term is not None:
            logits, teacher = _get(student_outputs(outputs), LOGITS, _STUDENT), _get(batch.teacher, LOGITS, _TEACHER)
            if self._logit_term is not None:
                logits, teacher = self._logit_term.meeting(logits, teacher, nn.Identity())
            return compute_loss(
                self._distill_term,
                logits,
                teacher,
                batch.labels,
                valid=batch.valid,
                temperature=temperature,
                pixels=self._pixels_of(batch),
                functions=self._functions(self._temperature),
            )
        assert self._custom_loss is not None
        return scalar_loss(self._custom_loss(outputs, batch), f"the loss {self._custom_loss!r}")

    def task_loss(self, outputs: Any, batch: KDBatch) -> Tensor:
        """The term `task`, a scalar: the mean over the valid rows. Override it for a task of your own.

        Args:
            outputs: what the student returns: logits `[N, K]`, or what `named_outputs` describes.
            batch: the batch of the outputs.
        """
        if self._custom_task is not None:
            return scalar_loss(self._custom_task(outputs, batch), f"the task loss {self._custom_task!r}")
        return self._cross_entropy(_get(student_outputs(outputs), LOGITS, _STUDENT), batch)

    @property
    def _heads(self) -> list[str]:
        """Outputs of the student that are logits too, and have a weight."""
        return [name for name in self.settings.heads if f"task.{name}" in self._weights]

    def _cross_entropy(self, logits: Tensor, batch: KDBatch) -> Tensor:
        """The cross-entropy with the labels, or for maps of logits, enlarged to the masks, with these."""
        smoothing = self.settings.label_smoothing
        if logits.ndim != 4:
            if batch.labels is None and batch.masks is not None:
                raise ConfigError(
                    f"the student returns logits {list(logits.shape)} for an image, and the batch has masks, the class "
                    "of each pixel; choose a network for segmentation, which returns {'logits': [N, K, h, w]}"
                )
            return self._functions()("task")(logits, labels=batch.labels, label_smoothing=smoothing, valid=batch.valid)
        pixels = self._pixels_of(batch)
        if pixels is None:
            raise ConfigError(
                f"the student returns logits {list(logits.shape)} for the pixels, and the batch has no masks, the "
                "class of each pixel; use data with masks, set distill.task_weight: 0, or choose a classifier"
            )
        size = pixels.masks.shape[1], pixels.masks.shape[2]
        labels, mask = pixels.at(size)
        logits = self._resize(logits, size)
        return self._functions()("task")(logits, labels=labels, label_smoothing=smoothing, mask=mask, valid=batch.valid)

    def _functions(self, temperature: float | Ramp | None = None) -> LossFunctions:
        """Where the losses come from; with a temperature that changes in each step, none is compiled."""
        if self._compiled is None or not self.training or isinstance(temperature, Ramp):
            return loss_by_name
        return self._compiled

    def _pixels_of(self, batch: KDBatch) -> PixelLabels | None:
        return None if batch.masks is None else self.pixels(batch.masks)

    def _add(self, term: Term, modules: TermModules) -> None:
        number = str(len(self._terms))
        self._terms += (term,)
        self.projectors.append(modules.projector)
        if modules.standardizer is not None:
            self.standardizers[number] = modules.standardizer
        if modules.queue is not None:
            self.queues[number] = modules.queue

    def _term_modules(self) -> Iterator[tuple[Term, TermModules]]:
        standardizers: Mapping[str, Any] = dict(self.standardizers.items())
        queues: Mapping[str, Any] = dict(self.queues.items())
        for number, (term, projector) in enumerate(zip(self._terms, self.projectors, strict=True)):
            yield term, TermModules(projector, standardizers.get(str(number)), queues.get(str(number)))

    def _check_teacher_logits(
        self, student: Tensor | None, teacher_outputs: Mapping[str, TensorSpec], num_classes: int | None
    ) -> None:
        """Raise a ConfigError if the term `distill` cannot compare the logits, or the classes are different ones."""
        logits = teacher_outputs.get(LOGITS)
        if logits is None and "distill" in self._weights and not self._is_own_loss:
            raise ConfigError(
                f"distill.loss: {self.settings.loss} compares logits, and the teacher returns "
                f"{', '.join(map(repr, teacher_outputs))}; set distill.loss: null, and distill.features to what is to "
                f"be compared{_logit_term(self.settings.loss, teacher_outputs)}"
            )
        have_classes = logits is not None and student is not None and len(logits.shape) == student.ndim in (2, 4)
        if have_classes and logits is not None and logits.shape[1] not in (None, num_classes):
            raise ConfigError(
                f"the teacher has {logits.shape[1]} classes and the data has {num_classes}; use a teacher and data "
                "with the same classes"
            )
        if self._distill_term is not None and not self._is_own_loss:
            assert logits is not None and student is not None  # `check_logits` was called
            if len(logits.shape) != student.ndim and 4 in (len(logits.shape), student.ndim):
                raise ConfigError(
                    f"distill: the student returns logits {list(student.shape)}, the teacher {logits}; let both have "
                    "logits for each image, or both for each pixel"
                )
            if student.ndim == 4:
                terms = self._distill_term, LOGITS, student, None, teacher_outputs
                self._logit_term = settle_term("distill", *terms, place="distill")[0]
                return
            try:
                check_on_zeros(self._distill_term, student, logits)
            except ConfigError as exc:
                raise ConfigError(f"distill: {exc}") from exc


def scalar_loss(value: object, owner: str) -> Tensor:
    """What a function of the user's returned, if it is a scalar tensor; `owner` is the function, for the message.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, Tensor) and value.shape == ():
        return value
    found = list(value.shape) if isinstance(value, Tensor) else type(value).__qualname__
    raise ConfigError(f"{owner} should return a scalar tensor, got {found}; take the batch mean")


def _logit_term(loss: str | None, teacher_outputs: Iterable[str]) -> str:
    """The term that `distill.loss` would be with one of several teachers; empty if none of them has logits."""
    named = next((name for name in teacher_outputs if name.endswith(f".{LOGITS}")), None)
    return "" if named is None else f", such as [{{loss: {loss}, student: {LOGITS}, teacher: {named}}}]"


def _student_name(name: str, term: TermSettings, student: nn.Module, own: Mapping[str, Tensor]) -> str:
    """The output or the layer of the student that a term means."""
    network = deployed_network(student)
    layers = dict(trunk_of(getattr(network, "_orig_mod", network)).named_modules(remove_duplicate=False))
    if term.student in own or term.student in layers or not is_alias(term.student):
        return term.student
    specs = {key: TensorSpec(tuple(output.shape), output.dtype) for key, output in own.items()}
    return find_output(term.student, specs, place=f"distill.features: {name}", owner="student")


def _check_soft_labels(terms: Collection[TermSettings]) -> None:
    for term in terms:
        if term.loss in NEED_LABELS:
            raise ConfigError(
                f"the loss {term.loss} needs one class per image, and mixing gives an image two; disable mixup and "
                "cutmix, or choose another loss"
            )


def _get(tensors: Mapping[str, Tensor], name: str, owner: str) -> Tensor:
    if name not in tensors:
        found = ", ".join(map(repr, tensors)) or "nothing"
        raise ConfigError(f"the loss needs {name!r} among {owner}, and found {found}")
    return tensors[name]
