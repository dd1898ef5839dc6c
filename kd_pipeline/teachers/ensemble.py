"""Several teachers as one: a weighted average of their softmax or of their logits, on the device."""

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
    """Open teachers that answer together; all read the same images.

    The logits `[N, K]` are those whose softmax is an average of the members' softmax, as Hinton et al. (arXiv
    1503.02531, section 1) take it for soft targets. `average="softmax"` is the arithmetic mean: exact at temperature 1,
    while a loss at temperature T softens the mean and not each member. `average="logits"` is the geometric mean, the
    weighted mean of the logits, and commutes with temperature.

    Features are left out, since those of different networks share no axes. Class names may be missing from some members
    and must be the same in the others. `max_batch` is the smallest one. `close()` closes the members too.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        weights: Sequence[float] | None = None,
        average: Literal["softmax", "logits"] = "softmax",
    ) -> None:
        """Join `teachers`, with equal `weights` unless given; weights are positive and count relative to their sum.

        Raises:
            ConfigError: there are no teachers, or the weights do not fit them.
            TeacherError: two members take different images or name different classes; says which, and both values.
        """
        self._members = tuple(teachers)
        self._weights = _normalized(weights, len(self._members))
        self._average = average
        images = _merge(self._members, "images", [member.images for member in self._members])
        logits = _merge(self._members, "logits", [member.outputs["logits"] for member in self._members])
        super().__init__(
            backend="ensemble",
            precision="+".join(dict.fromkeys(member.precision for member in self._members)),
            device=_common_device(self._members),
            images=images,
            outputs={"logits": logits},
            max_batch=min(member.max_batch for member in self._members),
            classes=_common_classes(self._members),
            fingerprint=self._digest(),
        )

    def _infer(self, images: Tensor) -> dict[str, Tensor]:
        answers = [member(images)["logits"] for member in self._members]
        if self._average == "logits":
            weighted = [weight * logits for weight, logits in zip(self._weights, answers, strict=True)]
            return {"logits": torch.stack(weighted).sum(0)}
        shares = [
            math.log(weight) + logits.log_softmax(1) for weight, logits in zip(self._weights, answers, strict=True)
        ]
        return {"logits": torch.stack(shares).logsumexp(0)}

    def _release(self) -> None:
        for member in self._members:
            member.close()

    def _digest(self) -> str:
        digest = hashlib.sha256(f"ensemble {self._average}".encode())
        for member, weight in zip(self._members, self._weights, strict=True):
            digest.update(f"\n{member.fingerprint} {weight.hex()}".encode())
        return digest.hexdigest()


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
    """The one spec that fits all; a size that some leave open is that of the others."""
    merged = specs[0]
    for number, spec in enumerate(specs):
        pairs = list(zip(merged.shape, spec.shape, strict=False))
        fits = len(merged.shape) == len(spec.shape) and merged.dtype == spec.dtype
        if not fits or any(None not in pair and pair[0] != pair[1] for pair in pairs):
            raise TeacherError(
                f"the members of an ensemble share their {what}: teacher {number} ({members[number].backend}) has "
                f"{spec}, those before it {merged}; export or open them for the same {what}"
            )
        merged = TensorSpec(tuple(known if size is None else size for known, size in pairs), merged.dtype)
    return merged


def _common_device(members: Sequence[Teacher]) -> torch.device:
    device = members[0].device
    for number, member in enumerate(members):
        if member.device != device:
            raise TeacherError(
                f"the members of an ensemble read the same images: teacher {number} ({member.backend}) is on "
                f"{member.device}, teacher 0 on {device}; open them on the same device"
            )
    return device


def _common_classes(members: Sequence[Teacher]) -> tuple[str, ...] | None:
    first: tuple[int, tuple[str, ...]] | None = None
    for number, member in enumerate(members):
        if member.classes is None:
            continue
        if first is None:
            first = number, member.classes
        # As long as each other: both have a name for each of the K logits.
        for index, (known, found) in enumerate(zip(first[1], member.classes, strict=True)):
            if found != known:
                raise TeacherError(
                    f"the members of an ensemble answer for the same classes: logit {index} is {found!r} for teacher "
                    f"{number} ({member.backend}) and {known!r} for teacher {first[0]}; reorder the classes of one"
                )
    return None if first is None else first[1]
