"""Judge a teacher by its predictions for labeled images, and find the likely cause if they are bad."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kd_pipeline._core.finite import has_softmax

__all__ = ["ProbeReport", "judge"]

_CONSTANT = 0.9
"""Share of one class among the predictions from which they count as constant."""
_MAX_FALSE_ALARMS = 1e-3
"""Probability that a teacher whose true top-1 is halfway from the required one to 1 is called bad. With fewer than
about thirty images, a top-1 below the required one may be an accident."""
_MAX_NAMED = 5
"""Pairs of a permutation to list in a message."""


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """Results of a probe."""

    num_samples: int
    """Labeled images that the teacher was run on."""
    is_augmented: bool
    """Whether they were augmented as for training, which costs accuracy compared to the images of an evaluation."""
    top1: float
    """Fraction of samples whose label is the top prediction."""
    chance: float
    """Expected `top1` if labels and predictions were independent; at least 1 / K."""
    required_top1: float
    """The `top1` required to pass."""
    mean_confidence: float | None
    """Mean of the largest softmax probability over the rows without NaN or inf; None if there are none."""
    num_bad_rows: int
    """Rows of logits with NaN or inf."""
    predicted: tuple[int, ...]
    """Number of predictions of each of the K classes, by rows without NaN or inf."""
    problems: tuple[str, ...]
    """What is wrong, a sentence each with a hint; empty for a teacher that passes."""


def judge(
    labels_N: Tensor,
    logits_NK: Tensor,
    min_factor: float,
    classes: tuple[str, ...] | None,
    *,
    is_augmented: bool = False,
) -> ProbeReport:
    """Compare the predictions with the labels.

    Args:
        labels_N: `[N]` int64.
        logits_NK: `[N, K]`.
        min_factor: required top-1, as a multiple of chance.
        classes: names in label order, for messages.
        is_augmented: whether the images were augmented as for training.
    """
    num_samples, num_classes = logits_NK.shape
    finite_N = has_softmax(logits_NK)
    # The top class of a row with NaN is arbitrary: no class, and never right.
    predicted_N = logits_NK.argmax(dim=1).masked_fill(~finite_N, -1)
    predicted_K = predicted_N[finite_N].bincount(minlength=num_classes)
    label_share_K = labels_N[labels_N < num_classes].bincount(minlength=num_classes) / num_samples
    chance = max(1 / num_classes, float((label_share_K * predicted_K / num_samples).sum()))
    report = ProbeReport(
        num_samples=num_samples,
        is_augmented=is_augmented,
        top1=_agreement(predicted_N, labels_N),
        chance=chance,
        required_top1=min(min_factor * chance, (1 + chance) / 2),
        mean_confidence=float(logits_NK[finite_N].softmax(dim=1).amax(dim=1).mean()) if finite_N.any() else None,
        num_bad_rows=int((~finite_N).sum()),
        predicted=tuple(predicted_K.tolist()),
        problems=(),
    )
    problems = [
        *_bad_values(report, labels_N),
        *_bad_predictions(report, labels_N[finite_N], predicted_N[finite_N], classes),
    ]
    return replace(report, problems=tuple(problems))


def _bad_values(report: ProbeReport, labels_N: Tensor) -> Iterator[str]:
    """What makes rows useless."""
    num_classes = len(report.predicted)
    if report.num_bad_rows:
        yield (
            f"{report.num_bad_rows} of {report.num_samples} rows of logits hold NaN or inf; check the teacher's "
            "weights and the images' normalization, and if it runs in fp16, use fp32 or bf16"
        )
    if int(labels_N.max()) >= num_classes:
        yield (
            f"labels go up to {int(labels_N.max())} and the teacher has {num_classes} logits; use a teacher of these "
            "classes"
        )


def _bad_predictions(
    report: ProbeReport, labels_N: Tensor, predicted_N: Tensor, classes: tuple[str, ...] | None
) -> Iterator[str]:
    """What is wrong with the predictions of the rows without NaN or inf."""
    if not len(predicted_N):
        return
    top1, required_top1 = report.top1, report.required_top1
    permutation = _permutation(labels_N, predicted_N, required_top1, classes)
    is_bad = top1 < required_top1 and _is_no_accident(top1, report.num_samples, (1 + required_top1) / 2)
    if is_bad or permutation is not None:
        hint = (
            _constant(predicted_N, classes)
            or _shift(labels_N, predicted_N, required_top1)
            or permutation
            or "the teacher hardly recognizes these images; are its weights loaded, are its classes those of the data, "
            "and was it trained with the mean, std and size of the transform?"
        )
        where = " on images augmented as for training" if report.is_augmented else ""
        yield f"top-1 is {top1:.1%}, chance {report.chance:.1%}, required {required_top1:.1%}{where}: {hint}"


def _is_no_accident(top1: float, num_samples: int, accuracy: float) -> bool:
    """Whether a teacher of this accuracy would hardly ever get so few of so many samples right."""
    if accuracy == 1:
        return top1 < 1
    log_right, log_wrong, log_ways = math.log(accuracy), math.log1p(-accuracy), math.lgamma(num_samples + 1)
    probability = 0.0
    for k in range(round(top1 * num_samples) + 1):
        log_choices = log_ways - math.lgamma(k + 1) - math.lgamma(num_samples - k + 1)
        probability += math.exp(log_choices + k * log_right + (num_samples - k) * log_wrong)
    return probability < _MAX_FALSE_ALARMS


def _constant(predicted_N: Tensor, classes: tuple[str, ...] | None) -> str | None:
    """The hint if nearly all predictions are of one class."""
    favorite = int(predicted_N.mode().values)
    if _agreement(predicted_N, torch.tensor(favorite)) < _CONSTANT:
        return None
    return (
        f"nearly all predictions are {_name(favorite, classes)}; was the teacher trained with the mean and std of the "
        "transform, and are its weights loaded?"
    )


def _shift(labels_N: Tensor, predicted_N: Tensor, required_top1: float) -> str | None:
    """The hint if the predictions are off by one."""
    for shift in (1, -1):
        shifted_top1 = _agreement(predicted_N, labels_N + shift)
        if shifted_top1 >= required_top1:
            return (
                f"the classes look shifted by {shift:+d}: label k is the teacher's class k{shift:+d} "
                f"({shifted_top1:.1%} agree then); does the teacher have a background class, or do its classes count "
                "from 1? Export it with its class names to match them by name"
            )
    return None


def _permutation(
    labels_N: Tensor, predicted_N: Tensor, required_top1: float, classes: tuple[str, ...] | None
) -> str | None:
    """The hint if most labels correspond one to one to a different predicted class.

    The correspondence is the majority vote of every other sample, tested on the rest: with few samples of each class,
    any correspondence fits the samples that it was taken from.
    """
    pairs = list(zip(labels_N.tolist(), predicted_N.tolist(), strict=True))
    class_of: dict[int, int] = {}
    for (label, predicted), _ in Counter(pairs[::2]).most_common():
        if label not in class_of and predicted not in class_of.values():
            class_of[label] = predicted
    tested = [(label, predicted) for label, predicted in pairs[1::2] if label in class_of]
    if not tested:
        return None
    permuted_top1 = sum(class_of[label] == predicted for label, predicted in tested) / len(tested)
    gain = permuted_top1 - sum(label == predicted for label, predicted in tested) / len(tested)
    # The standard deviation of a share of n samples is at most 1 / (2 √n); four of them are no accident.
    if permuted_top1 < required_top1 or gain < 2 / math.sqrt(len(tested)):
        return None
    moved = [
        f"{_name(label, classes)} -> {_name(predicted, classes)}"
        for label, predicted in sorted(class_of.items())
        if label != predicted
    ]
    return (
        f"the classes look permuted, label -> the teacher's class: {', '.join(moved[:_MAX_NAMED])}"
        f"{', ...' if len(moved) > _MAX_NAMED else ''} ({permuted_top1:.1%} agree then); give the source the "
        "teacher's order as `classes`, or export the teacher with its class names"
    )


def _agreement(predicted_N: Tensor, labels_N: Tensor) -> float:
    return float(predicted_N.eq(labels_N).float().mean())


def _name(label: int, classes: tuple[str, ...] | None) -> str:
    return str(label) if classes is None or label >= len(classes) else repr(classes[label])
