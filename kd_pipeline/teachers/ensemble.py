"""Several teachers as one: the weighted average of their softmax or of their logits."""

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from kd_pipeline._core.tensor_spec import TensorSpec
from kd_pipeline.errors import ConfigError, TeacherError
from kd_pipeline.teachers.base import Teacher

__all__ = ["EnsembleTeacher"]


class EnsembleTeacher(Teacher):
    """Open teachers whose averaged logits `[N, K]` are the output.

    Hinton et al. (arXiv 1503.02531, section 1) average the predictions of an ensemble for soft targets.
    `average="softmax"` is the arithmetic mean of the softmax, `log(sum_i w_i softmax(z_i))`: exact at temperature 1,
    while a loss at temperature T softens the mean rather than each member. `average="logits"` is the geometric mean,
    `sum_i w_i z_i`, and commutes with temperature.

    Features are dropped, as those of different networks have different axes. Members without class names take those of
    the others, which must agree. `max_batch` is the smallest of all. `close()` also closes the members.
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
            TeacherError: two members differ in images, number of logits, class names or device; names both.
        """
        self._members = tuple(teachers)
        self._weights = _normalized(weights, len(self._members))
        self._average = average
        images = _merge(self._members, "images", [member.images for member in self._members])
        logits = _merge(self._members, "logits", [member.outputs["logits"] for member in self._members])
        weighted = zip(self._members, self._weights, strict=True)
        content = [f"ensemble {average}", *(f"{member.fingerprint} {weight.hex()}" for member, weight in weighted)]
        super().__init__(
            backend="ensemble",
            precision="+".join(dict.fromkeys(member.precision for member in self._members)),
            device=_common_device(self._members),
            images=images,
            outputs={"logits": logits},
            max_batch=min(member.max_batch for member in self._members),
            classes=_common_classes(self._members),
            fingerprint=hashlib.sha256("\n".join(content).encode()).hexdigest(),
        )
        self.runtimes = tuple(runtime for member in self._members for runtime in member.runtimes)
        self.problems = tuple(
            f"member {number}: {problem}" for number, member in enumerate(self._members) for problem in member.problems
        )

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        logits = [member(images)["logits"] for member in self._members]
        weighted = list(zip(self._weights, logits, strict=True))
        if self._average == "logits":
            return {"logits": torch.stack([weight * logits_NK for weight, logits_NK in weighted]).sum(0)}
        log_shares = [math.log(weight) + logits_NK.log_softmax(1) for weight, logits_NK in weighted]
        return {"logits": torch.stack(log_shares).logsumexp(0)}

    def _release(self) -> None:
        for member in self._members:
            member.close()


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


def _merge(members: Sequence[Teacher], what: str, specs: Sequence[TensorSpec]) -> TensorSpec:
    """The one spec that fits all; a size that some leave open is the others'."""
    merged = specs[0]
    for number, spec in enumerate(specs):
        pairs = list(zip(merged.shape, spec.shape, strict=False))
        fits = len(merged.shape) == len(spec.shape) and merged.dtype == spec.dtype
        if not fits or any(None not in pair and pair[0] != pair[1] for pair in pairs):
            raise TeacherError(
                f"the members of an ensemble must share their {what}: teacher {number} ({members[number].backend}) has "
                f"{spec}, those before it {merged}; export or open them for the same {what}"
            )
        merged = TensorSpec(tuple(known if size is None else size for known, size in pairs), merged.dtype)
    return merged


def _common_device(members: Sequence[Teacher]) -> torch.device:
    device = members[0].device
    for number, member in enumerate(members):
        if member.device != device:
            raise TeacherError(
                f"the members of an ensemble must be on one device: teacher {number} ({member.backend}) is on "
                f"{member.device}, teacher 0 on {device}; open them on the same device"
            )
    return device


def _common_classes(members: Sequence[Teacher]) -> tuple[str, ...] | None:
    named = [(number, member.classes) for number, member in enumerate(members) if member.classes is not None]
    if not named:
        return None
    first, classes = named[0]
    for number, names in named:
        # Equally long: both have a name for each of the K logits.
        for index, (known, found) in enumerate(zip(classes, names, strict=True)):
            if found != known:
                raise TeacherError(
                    f"the members of an ensemble must have the same classes: logit {index} is {found!r} for teacher "
                    f"{number} ({members[number].backend}) and {known!r} for teacher {first}; reorder one of them"
                )
    return classes
