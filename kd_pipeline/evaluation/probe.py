"""The start-up probe: does the teacher know the training images, as the real graph delivers them?"""

import logging
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from kd_pipeline._core.settings import Settings
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.settings import Untaught
from kd_pipeline.data.sources.base import Source, open_source
from kd_pipeline.errors import TeacherError
from kd_pipeline.loader.loader import KDDataLoader, LoaderConfig
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.teacher import RecordedTeacher

__all__ = ["ProbeReport", "ProbeSettings", "ask_teacher", "probe_teacher"]

_logger = logging.getLogger("kd_pipeline")

_CONSTANT = 0.9
"""Part of the predictions that go to one class when they count as constant."""
_MAX_NAMED = 5
"""Most pairs of a permutation that a message lists."""


class ProbeSettings(Settings):
    """How the teacher is tried at the start of a run."""

    num_samples: int = Field(default=512, ge=1)
    """Training images that it is asked about; all of them where there are fewer."""
    min_factor: float = Field(default=5.0, ge=1)
    """Top-1 must be this many times what chance gives, but never more than half-way from chance to 1."""
    strict: bool = False
    """Stop a run whose teacher fails, rather than warn."""


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """How the teacher did."""

    num_samples: int
    """Labeled images that it was asked about."""
    top1: float
    """Part of them whose label is its first choice; from 0 to 1."""
    chance: float
    """What `top1` would be if labels and predictions had nothing to do with each other; at least 1 / K."""
    wanted_top1: float
    """A teacher passes from here on."""
    mean_confidence: float | None
    """Mean of its largest softmax probability over the rows without NaN or inf; None where there are none."""
    num_bad_rows: int
    """Rows of logits with NaN or inf."""
    predicted: tuple[int, ...]
    """How often each of the K classes was its first choice."""
    problems: tuple[str, ...]
    """What is wrong, a sentence each with a hint; empty for a teacher that passes."""


def probe_teacher(
    config: LoaderConfig, teacher: Teacher, settings: ProbeSettings | None = None, *, training: Source | None = None
) -> ProbeReport | None:
    """Ask `teacher` about training images before a run, and say what came of it.

    A teacher that passes gets one line in the log, any other a warning for each problem.

    Args:
        config, teacher, settings, training: as `ask_teacher`.

    Returns:
        What was found, or None where nothing could be.

    Raises:
        TeacherError: the settings are strict and there is a problem, or the teacher does not fit the data.
        ConfigError, DataError: as `KDDataLoader.from_config`.
    """
    report = ask_teacher(config, teacher, settings, training=training)
    if report is None:
        return None
    for problem in report.problems:
        _logger.warning("teacher probe: %s", problem)
    if report.problems and settings is not None and settings.strict:
        raise TeacherError(
            f"the teacher failed its probe on {report.num_samples} training images: {'; '.join(report.problems)}. "
            "Correct it, or let it pass with probe.strict: false"
        )
    if not report.problems:
        _logger.info(
            "teacher probe: top-1 %.1f%% on %d training images (chance %.1f%%), mean confidence %.2f",
            100 * report.top1,
            report.num_samples,
            100 * report.chance,
            report.mean_confidence,
        )
    return report


def ask_teacher(
    config: LoaderConfig, teacher: Teacher, settings: ProbeSettings | None = None, *, training: Source | None = None
) -> ProbeReport | None:
    """Ask `teacher` about training images, in the training transform's views, and compare with their labels.

    The images are the first of a shuffled epoch, not mixed, and the same on every rank, so that all ranks come to the
    same verdict. They are read by a loader of the probe's own: the position, the records and the random numbers of the
    run are not touched. A recorded teacher has no other answers than those of the run, and shows some of its first
    epoch.

    Args:
        config: the run; of it the seed and the split `train` are used.
        teacher: an open teacher, which stays open.
        settings: how many images, and what is wanted of the teacher; the defaults where left out.
        training: the source of the split `train`, where it is open already.

    Returns:
        What was found, or None where the training data has no labels, or a recording mixed images alone.

    Raises:
        TeacherError: the teacher does not fit the data.
        ConfigError, DataError: as `KDDataLoader.from_config`.
    """
    settings = settings or ProbeSettings()
    train = config.data.split("train")
    training = training or open_source(train.source)
    if training.labels is None:
        _logger.info("teacher probe: skipped, as the training data has no labels")
        return None
    if isinstance(teacher, RecordedTeacher):
        if train.mix is not None:
            _logger.info(
                "teacher probe: skipped, as the recorded teacher has seen mixed images, which have no one label"
            )
            return None
        labels_N, logits_NK = _recorded_rows(teacher, training.labels, settings.num_samples)
    else:
        # Shuffled, as a folder has one class after another.
        plain = Untaught.of(config.seed, config.data, "train", shuffle=True)
        with KDDataLoader.from_config(plain, "train", shard=Shard(), teacher=teacher, training=training) as loader:
            labels_N, logits_NK = _first_rows(loader, settings.num_samples)
    return _judge(labels_N, logits_NK, settings.min_factor, training.classes)


def _first_rows(loader: KDDataLoader, num_samples: int) -> tuple[Tensor, Tensor]:
    """Labels `[N]` and logits `[N, K]` of the first valid samples, on the CPU."""
    labels: list[Tensor] = []
    logits: list[Tensor] = []
    for batch in loader:
        assert batch.labels is not None
        labels.append(batch.labels[batch.valid].cpu())
        logits.append(batch.teacher["logits"][batch.valid].cpu())
        if sum(map(len, labels)) >= num_samples:
            break
    return torch.cat(labels)[:num_samples], torch.cat(logits)[:num_samples]


def _recorded_rows(teacher: RecordedTeacher, labels: NDArray[np.int64], num_samples: int) -> tuple[Tensor, Tensor]:
    """Labels `[N]` and logits `[N, K]` of places spread over the first recorded epoch, on the CPU."""
    num_places = teacher.manifest.num_rows
    # Spread, as an epoch that is not shuffled has one class after another.
    place = np.arange(min(num_samples, num_places)) * num_places // min(num_samples, num_places)
    sample = teacher.samples(0, place)
    return torch.from_numpy(labels[sample]), teacher.answers(0, place)["logits"].cpu()


def _judge(labels_N: Tensor, logits_NK: Tensor, min_factor: float, classes: tuple[str, ...] | None) -> ProbeReport:
    num_samples, num_classes = logits_NK.shape
    predicted_N = logits_NK.argmax(dim=1)
    predicted_K = predicted_N.bincount(minlength=num_classes)
    label_share_K = labels_N[labels_N < num_classes].bincount(minlength=num_classes) / num_samples
    chance = max(1 / num_classes, float((label_share_K * predicted_K / num_samples).sum()))
    wanted_top1 = min(min_factor * chance, (1 + chance) / 2)
    top1 = _agreement(predicted_N, labels_N)
    finite_N = logits_NK.isfinite().all(dim=1)
    num_bad_rows = int((~finite_N).sum())

    problems = []
    if num_bad_rows:
        problems.append(
            f"{num_bad_rows} of {num_samples} rows of logits hold NaN or inf; check the teacher's weights and the "
            "images' normalization, and run it in fp32 or bf16 if it runs in fp16"
        )
    if int(labels_N.max()) >= num_classes:
        problems.append(
            f"labels go up to {int(labels_N.max())} and the teacher has {num_classes} logits; take a teacher of these "
            "classes"
        )
    labels_N, predicted_N = labels_N[finite_N], predicted_N[finite_N]
    permutation = _permutation(labels_N, predicted_N, wanted_top1, classes)
    if num_bad_rows < num_samples and (top1 < wanted_top1 or permutation is not None):
        facts = f"top-1 is {top1:.1%}, chance {chance:.1%}, wanted {wanted_top1:.1%}"
        hint = (
            _constant(predicted_N, classes)
            or _shift(labels_N, predicted_N, wanted_top1)
            or permutation
            or "the teacher hardly knows these images; are its weights loaded, are its classes those of the data, and "
            "are mean, std and size of the transform those that it was trained with?"
        )
        problems.append(f"{facts}: {hint}")
    return ProbeReport(
        num_samples=num_samples,
        top1=top1,
        chance=chance,
        wanted_top1=wanted_top1,
        mean_confidence=float(logits_NK[finite_N].softmax(dim=1).amax(dim=1).mean()) if finite_N.any() else None,
        num_bad_rows=num_bad_rows,
        predicted=tuple(predicted_K.tolist()),
        problems=tuple(problems),
    )


def _constant(predicted_N: Tensor, classes: tuple[str, ...] | None) -> str | None:
    """What to say where one class gets nearly all predictions."""
    favorite = int(predicted_N.mode().values)
    if _agreement(predicted_N, torch.tensor(favorite)) < _CONSTANT:
        return None
    return (
        f"nearly all predictions are {_name(favorite, classes)}; are mean and std of the transform those that the "
        "teacher was trained with, and are its weights loaded?"
    )


def _shift(labels_N: Tensor, predicted_N: Tensor, wanted_top1: float) -> str | None:
    """What to say where the predictions are off by one."""
    for shift in (1, -1):
        shifted_top1 = _agreement(predicted_N, labels_N + shift)
        if shifted_top1 >= wanted_top1:
            return (
                f"the classes look shifted by {shift:+d}: label k is the teacher's class k{shift:+d} "
                f"({shifted_top1:.1%} agree so); does the teacher have a background class, or do its classes count "
                "from 1? Export it with its class names, and they are matched by name"
            )
    return None


def _permutation(
    labels_N: Tensor, predicted_N: Tensor, wanted_top1: float, classes: tuple[str, ...] | None
) -> str | None:
    """What to say where most labels have a class of their own among the predictions, but not the same one.

    One to one by majority. The majorities are those of every other sample and are tried on the rest: with few samples
    of each class anything would hold on the samples that it was read from.
    """
    pairs = list(zip(labels_N.tolist(), predicted_N.tolist(), strict=True))
    choice_of: dict[int, int] = {}
    for (label, choice), _ in Counter(pairs[::2]).most_common():
        if label not in choice_of and choice not in choice_of.values():
            choice_of[label] = choice
    tried = [(label, choice) for label, choice in pairs[1::2] if label in choice_of]
    if not tried:
        return None
    permuted_top1 = sum(choice_of[label] == choice for label, choice in tried) / len(tried)
    gain = permuted_top1 - sum(label == choice for label, choice in tried) / len(tried)
    # The share of n samples scatters by 1 / (2 √n) at most: four times that is no accident.
    if permuted_top1 < wanted_top1 or gain < 2 / math.sqrt(len(tried)):
        return None
    moved = [
        f"{_name(label, classes)} -> {_name(choice, classes)}"
        for label, choice in sorted(choice_of.items())
        if label != choice
    ]
    return (
        f"the classes look permuted, label -> the teacher's class: {', '.join(moved[:_MAX_NAMED])}"
        f"{', ...' if len(moved) > _MAX_NAMED else ''} ({permuted_top1:.1%} agree so); give the source the teacher's "
        "order as `classes`, or export the teacher with its class names"
    )


def _agreement(predicted_N: Tensor, labels_N: Tensor) -> float:
    return float(predicted_N.eq(labels_N).float().mean())


def _name(label: int, classes: tuple[str, ...] | None) -> str:
    return str(label) if classes is None or label >= len(classes) else repr(classes[label])
