"""Settings of the training loss."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, ValidationInfo, model_validator

from kd_pipeline import losses
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.losses.ramp import Ramp, min_value

__all__ = ["LOGITS", "DistillSettings", "TermSettings"]

LOGITS = "logits"
"""Name of a model's final output, where a term names a layer of the student or an output of the teacher."""

_LOGIT_LOSSES = ("cosine", "dist", "dkd", "hard_label", "logit_mse", "soft_target")
_FEATURE_LOSSES = ("attention_transfer", "channel_wise", "feature_cosine", "feature_mse")
_CUSTOM_LOSS = re.compile(r"\w+(\.\w+)*:\w+")


def _check_not_negative(value: float | Ramp) -> float | Ramp:
    if min_value(value) < 0:
        raise ValueError(f"should not fall below 0, got {min_value(value):g}")
    return value


def _check_positive(value: float | Ramp) -> float | Ramp:
    if min_value(value) <= 0:
        raise ValueError(f"should stay above 0, got {min_value(value):g}")
    return value


def _check_logit_loss(loss: str) -> str:
    return loss if _CUSTOM_LOSS.fullmatch(loss) else _check_known(loss, _LOGIT_LOSSES)


def _check_term_loss(loss: str) -> str:
    return _check_known(loss, (*_FEATURE_LOSSES, *_LOGIT_LOSSES))


def _check_known(loss: str, names: Sequence[str]) -> str:
    if loss not in names:
        raise ValueError(f"there is no loss called {loss!r}{suggest(loss, names)}")
    return loss


def _parameters(loss: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(losses, loss)).parameters


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
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("temperature", "valid")
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


Weight = Annotated[float | Ramp, AfterValidator(_check_not_negative)]
"""A number or a ramp, at least 0."""
Temperature = Annotated[float | Ramp, AfterValidator(_check_positive)]
"""A number or a ramp, above 0."""
Options = Annotated[dict[str, bool | float | str], AfterValidator(_parse_options)]
"""Arguments of the field `loss` that precedes this one."""


class TermSettings(Settings):
    """An extra term of the loss, which compares an output of the student with one of the teacher."""

    loss: Annotated[str, AfterValidator(_check_term_loss)]
    """Name of a function in `kd_pipeline.losses`."""
    student: str = LOGITS
    """Name of a layer of the student, as in `named_modules()`, or `logits`."""
    teacher: str = LOGITS
    """Name of an output of the teacher."""
    weight: Weight = 1.0
    temperature: Temperature | None = None
    """For losses with a temperature; defaults to that of the function."""
    options: Options = Field(default_factory=dict)
    """More arguments of the loss."""
    projector: Literal["none", "conv", "linear"] = "none"
    """Layer that maps the student's features to the teacher's number of channels, trained with the student: `conv` is
    a 1x1 convolution for maps `[N, C, H, W]`, `linear` is for `[N, D]` and `[N, L, D]`; both have a bias."""

    @model_validator(mode="after")
    def _check_temperature(self) -> Self:
        _check_temperature_is_used(self.temperature is not None, self.loss)
        return self

    @property
    def has_temperature(self) -> bool:
        """Whether the loss has a temperature."""
        return "temperature" in _parameters(self.loss)

    @property
    def name(self) -> str:
        """Name of the term in logs: the loss and the student's layer, such as `feature_mse.layer3`."""
        return self.loss if self.student == LOGITS else f"{self.loss}.{self.student}"


class DistillSettings(Settings):
    """The training loss, with timm's names: task_weight · task + distill_weight · loss + Σ weight · extra term."""

    loss: Annotated[str, AfterValidator(_check_logit_loss)] = "soft_target"
    """Loss between the student's and the teacher's logits: `soft_target`, `dkd`, `dist`, `logit_mse`, `cosine`,
    `hard_label`, or your own function of the logits and the batch, as `package.module:function`."""
    temperature: Temperature = 4.0
    """Divisor of both models' logits before the softmax, for losses with a temperature."""
    distill_weight: Weight | None = None
    """Weight of that loss."""
    task_weight: Weight | None = None
    """Weight of the cross-entropy with the labels. Defaults follow timm: `distill_weight` to 1 - task_weight, and
    `task_weight` to 1; if neither is set, they are 0.9 and 0.1."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of the cross-entropy with the labels."""
    options: Options = Field(default_factory=dict)
    """More arguments of the loss, such as `alpha` and `beta` of `dkd`, or `standardize`."""
    features: tuple[TermSettings, ...] = ()
    """Extra terms, on intermediate features or on the logits."""

    @model_validator(mode="after")
    def _check_terms(self) -> Self:
        _check_temperature_is_used(self.temperature != type(self).model_fields["temperature"].default, self.loss)
        names = ["task", "distill", *(term.name for term in self.features)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"features: two terms called {name}; change the layer of one, or remove it")
        if all(weight == 0 for weight in (*self.weights, *(term.weight for term in self.features))):
            raise ValueError("all weights are 0, so the student learns nothing; set one of them")
        return self

    @property
    def has_custom_loss(self) -> bool:
        """Whether `loss` is a function of the user's own."""
        return _CUSTOM_LOSS.fullmatch(self.loss) is not None

    @property
    def weights(self) -> tuple[float | Ramp, float | Ramp]:
        """`distill_weight` and `task_weight`, with timm's defaults."""
        if self.distill_weight is None and self.task_weight is None:
            return 0.9, 0.1
        if self.distill_weight is None and self.task_weight is not None:
            return _one_minus(self.task_weight), self.task_weight
        assert self.distill_weight is not None
        return self.distill_weight, 1.0 if self.task_weight is None else self.task_weight


def _check_temperature_is_used(is_set: bool, loss: str) -> None:
    if is_set and (_CUSTOM_LOSS.fullmatch(loss) or "temperature" not in _parameters(loss)):
        raise ValueError(f"temperature has no effect on {loss}; remove it, or choose a loss with a temperature")


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
    return rest
