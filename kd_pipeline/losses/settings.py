"""The loss of a run as a config spells it."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from kd_pipeline import losses
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import suggest
from kd_pipeline.losses.ramp import Ramp, smallest

__all__ = ["LOGITS", "DistillSettings", "TermSettings"]

LOGITS = "logits"
"""What a network returns at its end, where a term names a layer of the student or an output of the teacher."""

_LOGIT_LOSSES = ("cosine", "dist", "dkd", "hard_label", "logit_mse", "soft_target")
_FEATURE_LOSSES = ("attention_transfer", "channel_wise", "feature_cosine", "feature_mse")
_OWN = re.compile(r"\w+(\.\w+)*:\w+")


def _at_least_zero(value: float | Ramp) -> float | Ramp:
    if smallest(value) < 0:
        raise ValueError(f"should not fall below 0, got {smallest(value):g}")
    return value


def _above_zero(value: float | Ramp) -> float | Ramp:
    if smallest(value) <= 0:
        raise ValueError(f"should stay above 0, got {smallest(value):g}")
    return value


Weight = Annotated[float | Ramp, AfterValidator(_at_least_zero)]
"""A number, or one that changes in the course of the run; never below 0."""
Temperature = Annotated[float | Ramp, AfterValidator(_above_zero)]
Options = dict[str, bool | float | str]


class TermSettings(Settings):
    """A further term of the loss: an output of the student is compared with one of the teacher."""

    loss: str
    """One of the functions in `kd_pipeline.losses`, by name."""
    student: str = LOGITS
    """A layer of the student by name, as in `named_modules()`; `logits` is what the network returns."""
    teacher: str = LOGITS
    """An output of the teacher by name."""
    weight: Weight = 1.0
    temperature: Temperature | None = None
    """For the losses that have one; their own default unless given."""
    options: Options = Field(default_factory=dict)
    """Further arguments of the loss."""
    projector: Literal["none", "conv", "linear"] = "none"
    """What brings the student's features to the teacher's number of channels, and is trained along: `conv` is a 1x1
    convolution for maps `[N, C, H, W]`, `linear` a matrix for `[N, D]` and `[N, L, D]`, both with a bias."""

    @field_validator("loss")
    @classmethod
    def _is_known(cls, loss: str) -> str:
        return _known(loss, (*_FEATURE_LOSSES, *_LOGIT_LOSSES))

    @field_validator("options")
    @classmethod
    def _fit_the_loss(cls, options: Options, info: ValidationInfo) -> Options:
        return _checked_options(options, info.data.get("loss"))

    @model_validator(mode="after")
    def _has_the_temperature_it_sets(self) -> Self:
        _refuse_temperature(self.temperature is not None, self.loss)
        return self

    @property
    def has_temperature(self) -> bool:
        """Whether the loss has one."""
        return "temperature" in _parameters(self.loss)

    @property
    def name(self) -> str:
        """What the term is called among the others: its loss and the student's layer, such as `feature_mse.layer3`."""
        return self.loss if self.student == LOGITS else f"{self.loss}.{self.student}"


class DistillSettings(Settings):
    """The loss: task_weight · task + distill_weight · loss + the sum of weight · feature; the words are timm's."""

    loss: str = "soft_target"
    """How the student's logits are compared with the teacher's: `soft_target`, `dkd`, `dist`, `logit_mse`, `cosine`,
    `hard_label`, or a function of your own, `package.module:function`, of the logits and the batch."""
    temperature: Temperature = 4.0
    """Divides the logits of both before the softmax, in the losses that have one."""
    distill_weight: Weight | None = None
    """Weight of that comparison."""
    task_weight: Weight | None = None
    """Weight of the cross-entropy with the data's own labels. timm's rule for weights that are left out: without
    `distill_weight` it is 1 - task_weight, without `task_weight` that is 1. Without either, they are 0.9 and 0.1."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label that the cross-entropy with the labels spreads over all classes."""
    options: Options = Field(default_factory=dict)
    """Further arguments of the loss, such as `alpha` and `beta` of `dkd`, or `standardize`."""
    features: tuple[TermSettings, ...] = ()
    """Further terms: intermediate features, or a second comparison of the logits."""

    @field_validator("loss")
    @classmethod
    def _is_known(cls, loss: str) -> str:
        return loss if _OWN.fullmatch(loss) else _known(loss, _LOGIT_LOSSES)

    @field_validator("options")
    @classmethod
    def _fit_the_loss(cls, options: Options, info: ValidationInfo) -> Options:
        return _checked_options(options, info.data.get("loss"))

    @model_validator(mode="after")
    def _makes_one_loss(self) -> Self:
        _refuse_temperature(self.temperature != type(self).model_fields["temperature"].default, self.loss)
        names = ["task", "distill", *(term.name for term in self.features)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"features: two terms called {name}; give one of them another layer, or leave it out")
        if all(weight == 0 for weight in (*self.weights, *(term.weight for term in self.features))):
            raise ValueError("all weights are 0, so that nothing is learned; give one of the terms a weight")
        return self

    @property
    def names_a_function(self) -> bool:
        """Whether `loss` is a function of the user's."""
        return _OWN.fullmatch(self.loss) is not None

    @property
    def weights(self) -> tuple[float | Ramp, float | Ramp]:
        """`distill_weight` and `task_weight`, by timm's rule where one of them is left out."""
        if self.distill_weight is None and self.task_weight is None:
            return 0.9, 0.1
        if self.distill_weight is None and self.task_weight is not None:
            return _rest(self.task_weight), self.task_weight
        assert self.distill_weight is not None
        return self.distill_weight, 1.0 if self.task_weight is None else self.task_weight


def _known(loss: str, names: Sequence[str]) -> str:
    if loss not in names:
        raise ValueError(f"there is no loss called {loss!r}{suggest(loss, names)}")
    return loss


def _parameters(loss: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(losses, loss)).parameters


def _checked_options(options: Options, loss: str | None) -> Options:
    """The options, each of the type that the loss declares."""
    if loss is None or not options:  # what is wrong with the name of the loss has been said
        return options
    if _OWN.fullmatch(loss):
        raise ValueError(f"{loss} gets the logits and the batch alone; remove the options")
    kinds = {
        name: parameter.annotation
        for name, parameter in _parameters(loss).items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in ("temperature", "valid")
    }
    checked = {}
    for name, value in options.items():
        if name not in kinds:
            raise ValueError(f"{loss} has no option {name!r}{suggest(name, kinds)}")
        try:
            checked[name] = TypeAdapter(kinds[name]).validate_python(value, strict=True)
        except ValidationError as exc:
            raise ValueError(f"{name}: {exc.errors()[0]['msg']}, got {value!r}") from None
    return checked


def _refuse_temperature(is_set: bool, loss: str) -> None:
    if is_set and (_OWN.fullmatch(loss) or "temperature" not in _parameters(loss)):
        raise ValueError(f"temperature means nothing to {loss}; remove it, or take a loss that has one")


def _rest(task: float | Ramp) -> float | Ramp:
    """1 - task, over the whole course of it."""
    if isinstance(task, Ramp):
        if task.kind == "exponential":
            raise ValueError("1 - task_weight is no exponential ramp; give distill_weight too")
        rest: float | Ramp = task.model_copy(update={"start": 1 - task.start, "end": 1 - task.end})
    else:
        rest = 1 - task
    if smallest(rest) < 0:
        raise ValueError(f"1 - task_weight falls to {smallest(rest):g}; give distill_weight too")
    return rest
