"""Several teachers as one: the weighted average of their softmax or of their logits."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.combined import CombinedTeacher, merge_specs, of_view

__all__ = ["EnsembleTeacher"]


class EnsembleTeacher(CombinedTeacher):
    """Open teachers whose averaged logits `[N, K]` or `[N, K, h, w]` are the output.

    Hinton et al. (arXiv 1503.02531, section 1) average the predictions of an ensemble for soft targets.
    `average="softmax"` is the arithmetic mean of the softmax, `log(sum_i w_i softmax(z_i))`: exact at temperature 1,
    while a loss at temperature T softens the mean rather than each member. `average="logits"` is the geometric mean,
    `sum_i w_i z_i`, and commutes with temperature.

    Features are dropped, as those of different networks have different axes. Members without class names take those of
    the others, which must agree. Members are called `0`, `1` and so on.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        weights: Sequence[float] | None = None,
        average: Literal["softmax", "logits"] = "softmax",
    ) -> None:
        """Combine `teachers`. `weights` are positive, are divided by their sum, and default to equal ones.

        Raises:
            ConfigError: there are no teachers, or not one positive weight for each.
            TeacherError: a member has no logits, or two differ in images, number of logits, class names or device.
        """
        weights = _normalized(weights, len(teachers))
        members = {str(number): teacher for number, teacher in enumerate(teachers)}
        for name, member in members.items():
            if "logits" not in member.outputs:
                raise TeacherError(
                    f"an ensemble averages logits, and member {name} ({member.backend}) returns "
                    f"{', '.join(map(repr, member.outputs))}; give the members names, to have all their outputs: "
                    "members: {first: {...}, second: {...}}"
                )
        weighted = zip(teachers, weights, strict=True)
        content = [
            f"ensemble {average}",
            *(f"{member.fingerprint}{of_view(member)} {weight.hex()}" for member, weight in weighted),
        ]
        self._weights, self._average = weights, average
        super().__init__(
            members,
            backend="ensemble",
            outputs={},
            classes=None,
            fingerprint=hashlib.sha256("\n".join(content).encode()).hexdigest(),
        )
        # After the images, which are the more likely mistake.
        self.outputs = {"logits": merge_specs(members, "logits", [member.outputs["logits"] for member in teachers])}
        self.classes = _common_classes(members)

    def _infer(self, images: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits = [outputs["logits"] for outputs in self._run_members(images, self.members).values()]
        if len({len(each) for each in logits}) > 1:
            seen = [member.view for member in self.members.values()]
            views = ", ".join(f"{view} {len(each)}" for view, each in zip(seen, logits, strict=True))
            raise TeacherError(
                f"an ensemble averages rows of the same images, and its views have different numbers ({views}); give "
                "its members views with the same count"
            )
        weighted = list(zip(self._weights, logits, strict=True))
        if self._average == "logits":
            return {"logits": torch.stack([weight * logits_NK for weight, logits_NK in weighted]).sum(0)}
        log_shares = [math.log(weight) + logits_NK.log_softmax(1) for weight, logits_NK in weighted]
        return {"logits": torch.stack(log_shares).logsumexp(0)}


def _normalized(weights: Sequence[float] | None, num_members: int) -> list[float]:
    if num_members == 0:
        raise ConfigError("an ensemble of no teachers; give at least one")
    weights = [1.0] * num_members if weights is None else weights
    if len(weights) != num_members:
        raise ConfigError(f"the ensemble has {num_members} teachers and {len(weights)} weights; give one for each")
    for number, weight in enumerate(weights):
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"weight {number} of the ensemble should be a positive number, got {weight}")
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _common_classes(members: Mapping[str, Teacher]) -> tuple[str, ...] | None:
    named = [(name, member.classes) for name, member in members.items() if member.classes is not None]
    if not named:
        return None
    first, classes = named[0]
    for name, found_classes in named:
        # Equally long: both have a name for each of the K logits.
        for index, (known, found) in enumerate(zip(classes, found_classes, strict=True)):
            if found != known:
                raise TeacherError(
                    f"the members of an ensemble must have the same classes: logit {index} is {found!r} for member "
                    f"{name} ({members[name].backend}) and {known!r} for member {first}; reorder one of them"
                )
    return classes
