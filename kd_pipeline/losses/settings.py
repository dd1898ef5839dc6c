"""Settings of the training loss."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, TypeAdapter, ValidationError, ValidationInfo, model_validator

from kd_pipeline import losses
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.losses.ramp import Ramp, max_value, min_value

__all__ = ["LOGITS", "DistillSettings", "TermSettings"]

LOGITS = "logits"
"""Name of a model's final output, where a term names a layer of the student or an output of the teacher."""

_LOGIT_LOSSES = ("cosine", "dist", "dkd", "hard_label", "logit_mse", "soft_target")
_FEATURE_LOSSES = (
    "am_radio",
    "attention_transfer",
    "channel_wise",
    "feature_cosine",
    "feature_mse",
    "feature_smooth_l1",
    "relational",
)
_TENSORS = ("mask", "references_MD", "references_valid", "valid")
"""Arguments of losses that come with the batch."""
_QUEUE_SIZE = 4096
"""Earlier vectors of the teacher that `relational` compares with. The authors have 65,536 of 128 numbers each, as many
numbers as 8,192 vectors of 1,024."""
_CUSTOM_LOSS = re.compile(r"\w+(\.\w+)*:\w+")
_LOSS_NAME = re.compile(r"\w[\w.-]*(?<!_weight)(?<!_share)")
_TAKEN = (
    "cpu_cores", "cpu_energy_kj", "device_memory_gib", "device_use", "disk_mib_per_s", "distill", "gpu_energy_kj",
    "gradient_norm", "host_memory_gib", "images_per_s", "loader_share", "loss", "lr", "memory_gib", "pixel_accuracy",
    "skipped_steps", "task", "teacher_share", "temperature", "top1",
)  # fmt: skip
"""What is logged besides a student's losses, as `train/<name>`."""

_WEIGHTS = {"soft_target": (0.9, 0.1), "hard_label": (0.5, 0.5)}
"""`distill_weight` and `task_weight` of the losses that share a weight of 1 with the cross-entropy: those of mdistiller
and RepDistiller, and of DeiT. Every other loss has 1 beside a cross-entropy of weight 1."""


def _check_not_negative(value: float | Ramp) -> float | Ramp:
    if min_value(value) < 0:
        raise ValueError(f"should not fall below 0, got {min_value(value):g}")
    return value


def _check_logit_loss(loss: str | None) -> str | None:
    return loss if loss is None or _CUSTOM_LOSS.fullmatch(loss) else _check_known(loss, _LOGIT_LOSSES)


def _check_term_loss(loss: str) -> str:
    return _check_known(loss, (*_FEATURE_LOSSES, *_LOGIT_LOSSES))


def _check_known(loss: str, names: Sequence[str]) -> str:
    if loss not in names:
        raise ValueError(f"there is no loss called {loss!r}{suggest(loss, names)}")
    return loss


def _parameters(loss: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(losses, loss)).parameters


def _complete_temperature(value: float | Ramp | None, info: ValidationInfo) -> float | Ramp | None:
    loss = info.data.get("loss")
    if loss is None:  # was rejected already
        return value
    parameter = None if _CUSTOM_LOSS.fullmatch(loss) else _parameters(loss).get("temperature")
    if value is None:
        return None if parameter is None else float(parameter.default)
    if parameter is None:
        raise ValueError(
            f"temperature has no effect on {loss}; remove it or set it to null, or choose a loss with a temperature"
        )
    if min_value(value) <= 0:
        raise ValueError(f"should stay above 0, got {min_value(value):g}")
    return value


def _parse_options(options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    """The options, each converted to the type that the loss declares."""
    loss = info.data.get("loss")
    if loss is None or not options:  # a loss that is None was rejected already
        return options
    if _CUSTOM_LOSS.fullmatch(loss):
        raise ValueError(f"{loss} gets the logits and the batch only; remove the options")
    types = {
        name: parameter.annotation
        for name, parameter in _parameters(loss).items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("temperature", *_TENSORS)
    }
    parsed = {}
    for name, value in options.items():
        if name not in types:
            raise ValueError(f"{loss} has no option {name!r}{suggest(name, types)}")
        try:
            parsed[name] = TypeAdapter(types[name]).validate_python(value, strict=True)
        except ValidationError as exc:
            raise ValueError(f"{name}: {exc.errors()[0]['msg']}, got {value!r}") from None
    return parsed


def _complete_queue_size(value: int | None, info: ValidationInfo) -> int | None:
    loss = info.data.get("loss")
    if loss == "relational":
        return _QUEUE_SIZE if value is None else value
    if loss is not None and value is not None:  # one that is None was rejected already
        raise ValueError(f"queue_size has no effect on {loss}; remove it or set it to null")
    return value


Weight = Annotated[float | Ramp, AfterValidator(_check_not_negative)]
"""A number or a ramp, at least 0."""
Temperature = Annotated[float | Ramp | None, AfterValidator(_complete_temperature)]
"""A number or a ramp, above 0, of the field `loss` that precedes this one; its own if None, and None if it has none."""
Options = Annotated[dict[str, bool | float | str], AfterValidator(_parse_options)]
"""Arguments of the field `loss` that precedes this one."""


class TermSettings(Settings):
    """An extra term of the loss, which compares an output of the student with one of the teacher.

    The two need not have the same width, kind or size. A vector meets the mean of a map or of tokens; tokens, without
    those at the start that are no part of the image, meet a map as the grid that they are of.
    """

    loss: Annotated[str, AfterValidator(_check_term_loss)]
    """Name of a function in `kd_pipeline.losses`."""
    student: str = LOGITS
    """Name of an output of the student, of one of its layers as in `named_modules()`, `layer:N` or `stage:N`. `pooled`
    and `spatial` also stand for its only vector besides the logits, and its only map or tokens."""
    teacher: str = LOGITS
    """Name of an output of the teacher, `member.output` if there are several; `pooled` and `spatial` as above, also
    within a member."""
    weight: Weight = 1.0
    """Factor of the term in the loss; a ramp changes it during training."""
    temperature: Temperature = Field(default=None, validate_default=True)
    """Divisor of both models' outputs before the softmax; defaults to that of the loss. None for one without."""
    options: Options = Field(default_factory=dict)
    """More arguments of the loss."""
    projector: Literal["auto", "none", "linear", "mlp", "conv"] = "auto"
    """Layer that maps the student's features to the teacher's number of channels, trained with the student: `linear`
    is for vectors `[N, D]` and tokens `[N, L, D]`, `conv`, a 1x1 convolution, for maps `[N, C, H, W]`, both with a
    bias; `mlp` for all of them is that of C-RADIO (linear, LayerNorm, GELU, linear), as wide inside as the wider of the
    two. `auto` is `none` if the loss needs none or the numbers agree, else `linear` or `conv`."""
    grid: Literal["teacher", "student", "smaller"] | PositiveInt = "teacher"
    """Height and width at which maps are compared: those of one side, the smaller of both, or a number for both."""
    resize: Literal["auto", "bilinear", "area"] = "auto"
    """How to get there: `bilinear` interpolates between the centers of pixels, `area` takes the mean of those that a
    new one covers; `auto` enlarges by the first and shrinks by the second."""
    standardize: Literal["none", "global", "channels", "phi_s"] = "none"
    """What to make of the teacher's features before they are compared, to let teachers and levels weigh the same. All
    subtract the mean of each channel; then `global` divides by one number, the root of the mean variance, `channels` by
    the deviation of each channel (Theia, arXiv 2407.20179), and `phi_s` rotates them so that all have the same variance
    (PHI-S, arXiv 2410.01680). The statistics are those of the first 128 batches."""
    queue_size: Annotated[PositiveInt | None, AfterValidator(_complete_queue_size)] = Field(
        default=None, validate_default=True
    )
    """For `relational`, how many earlier vectors of the teacher to compare with besides those of the batch; defaults to
    4096. They are part of checkpoints. None for other losses."""
    skip_ignored: bool = False
    """Leave out the positions whose pixel has the ignore index in `batch.masks`; only for data with masks."""


class DistillSettings(Settings):
    """The training loss: task_weight · task + distill_weight · loss + Σ weight · extra term, or loss of the student.

    The task is the cross-entropy with the labels, or a function of your own.

    What is left out is filled in with the loss's own values, so the settings of a run tell what ran.
    """

    loss: Annotated[str | None, AfterValidator(_check_logit_loss)] = "soft_target"
    """Loss between the student's and the teacher's logits: `soft_target`, `dkd`, `dist`, `logit_mse`, `cosine`,
    `hard_label`, or your own function of the logits and the batch, as `package.module:function`. None if only
    `features` are compared, which is the default for a student without a head (`student.num_classes: 0`)."""
    temperature: Temperature = Field(default=None, validate_default=True)
    """Divisor of both models' logits before the softmax. Defaults to the loss's own, which is that of its function in
    `kd_pipeline.losses`: 4 for `soft_target` and `dkd`, 1 for `dist`. None for a loss without a temperature."""
    distill_weight: Weight | None = None
    """Weight of that loss. Defaults to 0.9 for `soft_target`, 0.5 for `hard_label` and 1 for the others; if
    `task_weight` is set, to 1 - `task_weight` for the first two, as in timm's `LogitDistillationTask`."""
    task_weight: Weight | None = None
    """Weight of the task. Defaults to 0.1 for `soft_target`, 0.5 for `hard_label` and 1 for
    the others; if `distill_weight` is set, to 1, as in timm's `LogitDistillationTask`."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropy with the labels."""
    task_loss: str | None = Field(default=None, pattern=_CUSTOM_LOSS.pattern)
    """Your own function of what the student returns and the batch, as `package.module:function`, instead of the
    cross-entropy with the labels. It returns a scalar, the mean over the valid rows."""
    heads: dict[str, Weight] = Field(default_factory=dict)
    """Weights of the cross-entropy with the labels for further outputs of the student that are logits, such as `{aux:
    0.5}` for the auxiliary head of torchvision's networks for segmentation, each a term `task.aux`. A term of
    `features` distills such a head: of maps `{loss: channel_wise, student: aux, options: {over: channels}}`."""
    options: Options = Field(default_factory=dict)
    """More arguments of the loss, such as `alpha` and `beta` of `dkd`, or `standardize`."""
    skip_ignored: bool = False
    """Leave pixels that have the ignore index in `batch.masks` out of this loss too, as of the cross-entropy; only for
    data with masks."""
    features: tuple[TermSettings, ...] = ()
    """Extra terms, on intermediate features or on the logits."""
    student_losses: dict[str, Weight] = Field(default_factory=dict)
    """Weights of the losses that the student itself returns, by their names: `{balance: 0.01}` for a student that
    returns `losses: {balance: scalar}`; a loss without a name, the scalar `loss`, is called `student`. All that it
    returns must be listed, those to leave out with 0."""

    @model_validator(mode="after")
    def _complete_weights(self) -> Self:
        wanted = 1.0 if self.loss is None and self.task_loss is not None else None
        task = wanted if self.task_weight is None else self.task_weight
        distill_weight, task_weight = _complete(self.loss, self.distill_weight, task)
        # The settings are frozen for everybody else.
        object.__setattr__(self, "distill_weight", distill_weight)
        object.__setattr__(self, "task_weight", task_weight)
        return self

    @model_validator(mode="after")
    def _check_terms(self) -> Self:
        names = self.term_names
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"features: two terms called {name}; change the layer of one, or remove it")
        self._check_task()
        for name in self.student_losses:
            if name in (*_TAKEN, *names, *self.task_names) or not _LOSS_NAME.fullmatch(name):
                raise ValueError(f"student_losses: {name!r} is taken or no name; rename it in the student")
        sources = (self.loss, self.features, self.student_losses, self.task_loss, self.heads)
        if not any(sources):
            raise ValueError("loss: null leaves nothing to learn from; set loss, or features to compare")
        extra = (*(term.weight for term in self.features), *self.student_losses.values(), *self.heads.values())
        if not any(max_value(weight) for weight in (*self.weights, *extra)):
            raise ValueError("all weights are 0, so the student learns nothing; set one of them")
        return self

    def _check_task(self) -> None:
        if LOGITS in self.heads:
            raise ValueError(f"heads: {LOGITS} is the main head, whose weight is task_weight; remove it")
        if self.task_loss is None:
            return
        if not max_value(self.weights[1]):
            raise ValueError("task_loss has no effect with task_weight: 0; remove it, or set task_weight")
        if self.label_smoothing and not self.heads:
            raise ValueError(f"label_smoothing has no effect on {self.task_loss}; remove it")

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the terms that compare with the labels: `task`, and `task.aux` for the head `aux`."""
        return ("task", *(f"task.{name}" for name in self.heads))

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the `features` in logs: the loss and the student's output, such as `feature_mse.layer3`.

        Where several would have the same name, the teacher's output follows: `cosine.pooled.dino.pooled`. `logits` of
        the student are left out.
        """
        names = [term.loss if term.student == LOGITS else f"{term.loss}.{term.student}" for term in self.features]
        return tuple(
            f"{name}.{term.teacher}" if names.count(name) > 1 else name
            for name, term in zip(names, self.features, strict=True)
        )

    @property
    def has_custom_loss(self) -> bool:
        """Whether `loss` is a function of the user's own."""
        return self.loss is not None and _CUSTOM_LOSS.fullmatch(self.loss) is not None

    @property
    def may_read_all(self) -> bool:
        """Whether a function of the user's own may read any output of the teacher."""
        distill_weight, task_weight = self.weights
        return (self.has_custom_loss and max_value(distill_weight) > 0) or (
            self.task_loss is not None and max_value(task_weight) > 0
        )

    @property
    def weights(self) -> tuple[float | Ramp, float | Ramp]:
        """`distill_weight` and `task_weight`."""
        assert self.distill_weight is not None and self.task_weight is not None  # filled in by the validator
        return self.distill_weight, self.task_weight


def _complete(
    loss: str | None, distill_weight: float | Ramp | None, task_weight: float | Ramp | None
) -> tuple[float | Ramp, float | Ramp]:
    """Both weights, those that are None with their defaults."""
    if loss is None:
        if distill_weight is not None and max_value(distill_weight):
            raise ValueError("distill_weight has no effect without a loss; remove it, or set loss")
        return 0.0, 0.0 if task_weight is None else task_weight
    own_distill_weight, own_task_weight = _WEIGHTS.get(loss, (1.0, 1.0))
    if distill_weight is None and task_weight is None:
        return own_distill_weight, own_task_weight
    if task_weight is None:
        assert distill_weight is not None
        return distill_weight, 1.0
    if distill_weight is None:
        return (_one_minus(task_weight) if loss in _WEIGHTS else own_distill_weight), task_weight
    return distill_weight, task_weight


def _one_minus(task_weight: float | Ramp) -> float | Ramp:
    if isinstance(task_weight, Ramp):
        if task_weight.kind == "exponential":
            raise ValueError("1 - task_weight is not an exponential ramp; set distill_weight too")
        update = {"start": 1 - task_weight.start, "end": 1 - task_weight.end}
        rest: float | Ramp = task_weight.model_copy(update=update)
    else:
        rest = 1 - task_weight
    if min_value(rest) < 0:
        raise ValueError(f"1 - task_weight falls to {min_value(rest):g}; set distill_weight too")
    if max_value(rest) == 0:
        raise ValueError(
            "task_weight: 1 leaves 1 - 1 = 0 for the teacher; set distill_weight too, to 0 if that is what you want"
        )
    return rest
