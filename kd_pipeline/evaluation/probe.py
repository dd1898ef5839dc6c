"""The start-up probe: how well does the teacher classify the training images, as the loader delivers them?"""

import logging
import math
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.finite import has_softmax
from kd_pipeline._core.settings import Settings
from kd_pipeline.batch import KDBatch
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import Source, open_source
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.errors import StateError, TeacherError
from kd_pipeline.loader.batch_loader import AnyLoader, BatchLoader
from kd_pipeline.loader.config_split import EACH_IMAGE_ONCE
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.base import Teacher, is_logits
from kd_pipeline.teachers.outputs_check import probability_problem
from kd_pipeline.teachers.recorded.recording import Recording

if TYPE_CHECKING:
    from kd_pipeline.config.config import Config

__all__ = ["FirstBatches", "ProbeReport", "ProbeSettings", "probe_teacher", "run_probe"]

_logger = logging.getLogger("kd_pipeline")

_CONSTANT = 0.9
"""Share of one class among the predictions from which they count as constant."""
_MAX_FALSE_ALARMS = 1e-3
"""Probability that a teacher whose true top-1 is halfway from the required one to 1 is called bad. With fewer than
about thirty images, a top-1 below the required one may be an accident."""
_MAX_NAMED = 5
"""Pairs of a permutation to list in a message."""


class ProbeSettings(Settings):
    """How the teacher is probed at the start of a run."""

    num_samples: int = Field(default=512, ge=1)
    """Training images to judge the teacher by; all if there are fewer."""
    max_seconds: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    """Wall time after which it is judged by fewer images: those of the batches so far."""
    min_factor: float = Field(default=5.0, ge=1)
    """Required top-1, as a multiple of chance; at most halfway from chance to 1."""
    strict: bool = False
    """Stop the run if the teacher fails this, or returns doubtful outputs when it opens, instead of a warning. The
    teacher is then probed before the first step."""


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


def probe_teacher(
    config: "Config",
    teacher: Teacher | Recording,
    settings: ProbeSettings | None = None,
    *,
    training: Source | None = None,
    plugins: Collection[str] = (),
) -> dict[str, ProbeReport]:
    """Run `run_probe` before a run for all logits of the teacher, of which several teachers have several, and log it.

    That is one line for logits that pass, else a warning per problem.

    Args:
        config, teacher, settings, training, plugins: as for `run_probe`.

    Returns:
        The reports by the names of the outputs; none if the data cannot show anything.

    Raises:
        TeacherError: there is a problem and the settings are strict, or the teacher does not fit the data.
        ConfigError, DataError: as `KDDataLoader.from_config`.
    """
    reports = {}
    outputs = [name for name in teacher.outputs if is_logits(name)]
    if not outputs:
        _logger.info("teacher probe: skipped, because the teacher has no logits")
    for output in outputs:
        report = run_probe(config, teacher, settings, training=training, output=output, plugins=plugins)
        if report is None:
            break  # for a reason that holds for the others too
        reports[output] = report
        _log(report, output)
        if report.problems and settings is not None and settings.strict:
            raise TeacherError(
                f"the teacher failed its probe on {report.num_samples} training images{_of(output)}: "
                f"{'; '.join(report.problems)}. Correct it, or continue anyway with probe.strict: false"
            )
    return reports


class FirstBatches:
    """Probes a teacher by the first batches of a run, whose outputs the run needs anyway, and logs the report.

    There must be no reason to look at others: `of_run` returns None if there is.
    """

    def __init__(self, loader: AnyLoader, settings: ProbeSettings) -> None:
        """Judge the teacher of `loader` by the batches that `add` gets."""
        self._teacher, self._settings = loader.teacher, settings
        transform = None if isinstance(loader, BatchLoader) else loader.transform
        self._classes, self._is_augmented = loader.classes, isinstance(transform, TrainTransform)
        assert loader.teacher is not None
        self._rows = _Rows(settings, [name for name in loader.teacher.outputs if is_logits(name)])
        self.is_done = False
        """Whether enough has been seen and the report is logged."""

    @classmethod
    def of_run(cls, loader: AnyLoader, settings: ProbeSettings) -> "FirstBatches | None":
        """For a run that is not to stop, whose images show what its own probe would: shuffled, unmixed, each once.

        Of a loader of the user's own, nobody knows the order; and the first shards may be of few classes.
        """
        if isinstance(loader, BatchLoader):
            return None
        is_like_probe = loader.mix is None and loader.plan.shuffle is True and loader.plan.repeats == 1
        teacher = loader.teacher
        ranks = (
            {} if teacher is None else {len(each.shape) for name, each in teacher.outputs.items() if is_logits(name)}
        )
        has_all = isinstance(teacher, Teacher) and ranks == {2} and loader.has_labels
        return cls(loader, settings) if is_like_probe and has_all and not settings.strict else None

    def add(self, batch: KDBatch) -> None:
        """Look at a batch; a GPU has to finish it first."""
        self._rows.add(batch)
        if self._rows.is_enough:
            self.finish()

    def finish(self) -> None:
        """Judge the teacher by what has been seen, unless that is done."""
        if not self.is_done and self._rows.num_rows:
            self.is_done = True
            settings, is_augmented = self._settings, self._is_augmented
            for output in self._rows.outputs:
                labels_N, logits_NK = self._rows.take(output)
                report = _judge(labels_N, logits_NK, settings.min_factor, self._classes, is_augmented=is_augmented)
                _log(_with_probability_problem(report, logits_NK, self._teacher), output)


def _of(output: str) -> str:
    """Which logits are meant, where there are several teachers."""
    return "" if output == "logits" else f" ({output})"


def _log(report: ProbeReport, output: str) -> None:
    for problem in report.problems:
        _logger.warning("teacher probe%s: %s", _of(output), problem)
    if not report.problems:
        _logger.info(
            "teacher probe%s: top-1 %.1f%% on %d training images%s (chance %.1f%%), mean confidence %.2f",
            _of(output),
            100 * report.top1,
            report.num_samples,
            ", augmented as for training" if report.is_augmented else "",
            100 * report.chance,
            report.mean_confidence,
        )


def run_probe(
    config: "Config",
    teacher: Teacher | Recording,
    settings: ProbeSettings | None = None,
    *,
    training: Source | None = None,
    output: str = "logits",
    plugins: Collection[str] = (),
) -> ProbeReport | None:
    """Run `teacher` on training images in the training transform's views, and compare its predictions with the labels.

    The images are the first of a shuffled epoch, not mixed, and the same on every rank; how many there are also depends
    on the time, so with several ranks let one of them decide. The probe has a loader of its own and does not affect the
    run's position, files or random numbers. A recording has no other outputs than those of the run; samples of its
    first epoch are taken.

    Args:
        config: the run; its seed and split `train` are used.
        teacher: an open teacher, which stays open, or a recording.
        settings: number of images and requirements.
        training: the source of the split `train`, if already open.
        output: name of the logits to judge, such as `member.logits` of one of several teachers.
        plugins: modules that ops may come from, and the source if it is not open.

    Returns:
        The report, or None if the training data has no labels, the teacher no such output, or a recording only mixed
        images.

    Raises:
        TeacherError: the teacher does not fit the data, or the recording is damaged.
        StateError: the recording is of more images.
        ConfigError, DataError: as `KDDataLoader.from_config`.
    """
    settings = settings or ProbeSettings()
    train = config.data.split("train")
    training = training or open_source(train.source, plugins=plugins)
    if training.labels is None:
        _logger.info("teacher probe: skipped, because the training data has no labels")
        return None
    if output not in teacher.outputs:
        _logger.info("teacher probe: skipped, because the teacher has no %s", output)
        return None
    if len(teacher.outputs[output].shape) != 2:
        _logger.info("teacher probe: skipped, because the teacher's %s are of pixels, and labels of images", output)
        return None
    if isinstance(teacher, Recording):
        if train.mix is not None:
            _logger.info("teacher probe: skipped, because the recording is of mixed images, which have no single label")
            return None
        labels_N, logits_NK = _recorded_rows(teacher, training.labels, settings.num_samples, output)
    else:
        # Shuffled, because a folder lists one class after another.
        options = {**EACH_IMAGE_ONCE, "shown_views": teacher.views}
        with KDDataLoader.from_config(
            config,
            teacher=teacher,
            shard=Shard(),
            training=training,
            plugins=plugins,
            shuffle=True,
            ahead=0,
            **options,
        ) as loader:
            labels_N, logits_NK = _first_rows(loader, settings, output)
    report = _judge(
        labels_N,
        logits_NK,
        settings.min_factor,
        training.classes,
        is_augmented=isinstance(train.transform, TrainTransform),
    )
    return _with_probability_problem(report, logits_NK, teacher)


def _with_probability_problem(
    report: ProbeReport, logits_NK: Tensor, teacher: Teacher | Recording | None
) -> ProbeReport:
    # What was found when the teacher was opened is known already.
    known = " ".join(teacher.problems) if isinstance(teacher, Teacher) else ""
    problem = probability_problem(logits_NK)
    if problem is None or problem in known:
        return report
    return replace(report, problems=(*report.problems, f"the logits {problem}"))


class _Rows:
    """Labels, and logits of the outputs by name, of the first valid samples, on the CPU."""

    def __init__(self, settings: ProbeSettings, outputs: Sequence[str]) -> None:
        self.outputs = outputs
        self._settings = settings
        self._logits: dict[str, list[tuple[Tensor, Tensor]]] = {output: [] for output in outputs}
        """Labels and logits of each batch, of which every copy of an image is a row."""
        self._started_s = time.monotonic()
        self.num_rows = 0

    def add(self, batch: KDBatch) -> None:
        for output, rows in self._logits.items():
            of_output = batch.of_view(batch.teacher_views.get(output, IMAGES))
            assert of_output.labels is not None
            rows.append((of_output.labels[of_output.valid].cpu(), of_output.teacher[output][of_output.valid].cpu()))
        self.num_rows += int(batch.valid.sum())

    @property
    def is_enough(self) -> bool:
        """Whether there are as many as wanted, or some and the time is over."""
        is_late = time.monotonic() - self._started_s >= self._settings.max_seconds
        return self.num_rows >= self._settings.num_samples or (is_late and self.num_rows > 0)

    def take(self, output: str) -> tuple[Tensor, Tensor]:
        """Labels `[N]` and logits `[N, K]` of one of the outputs."""
        labels, logits = zip(*self._logits[output], strict=True)
        num_samples = self._settings.num_samples
        return torch.cat(labels)[:num_samples], torch.cat(logits)[:num_samples]


def _first_rows(loader: KDDataLoader, settings: ProbeSettings, output: str) -> tuple[Tensor, Tensor]:
    """Labels `[N]` and logits `[N, K]` of the first valid samples, on the CPU."""
    rows = _Rows(settings, [output])
    for batch in loader:
        rows.add(batch)
        if rows.is_enough:
            break
    return rows.take(output)


def _recorded_rows(
    recording: Recording, labels: NDArray[np.int64], num_samples: int, output: str
) -> tuple[Tensor, Tensor]:
    """Labels `[N]` and logits `[N, K]` of positions spread over the first recorded epoch, on the CPU."""
    num_rows = recording.manifest.num_rows
    # Spread out, because an epoch without shuffling has one class after another.
    position = np.arange(min(num_samples, num_rows)) * num_rows // min(num_samples, num_rows)
    sample = recording.samples(0, position)
    if sample.max() >= len(labels):
        raise StateError(
            f"the recording in {recording.path} is of {num_rows} images, and the training data has {len(labels)}; "
            "record the teacher again"
        )
    return torch.from_numpy(labels[sample]), recording.read(0, position, outputs=(output,))[output]


def _judge(
    labels_N: Tensor,
    logits_NK: Tensor,
    min_factor: float,
    classes: tuple[str, ...] | None,
    *,
    is_augmented: bool = False,
) -> ProbeReport:
    num_samples, num_classes = logits_NK.shape
    finite_N = has_softmax(logits_NK)
    # The top class of a row with NaN is arbitrary: no class, and never right.
    predicted_N = logits_NK.argmax(dim=1).masked_fill(~finite_N, -1)
    predicted_K = predicted_N[finite_N].bincount(minlength=num_classes)
    label_share_K = labels_N[labels_N < num_classes].bincount(minlength=num_classes) / num_samples
    chance = max(1 / num_classes, float((label_share_K * predicted_K / num_samples).sum()))
    required_top1 = min(min_factor * chance, (1 + chance) / 2)
    top1 = _agreement(predicted_N, labels_N)
    num_bad_rows = int((~finite_N).sum())

    problems = []
    if num_bad_rows:
        problems.append(
            f"{num_bad_rows} of {num_samples} rows of logits hold NaN or inf; check the teacher's weights and the "
            "images' normalization, and if it runs in fp16, use fp32 or bf16"
        )
    if int(labels_N.max()) >= num_classes:
        problems.append(
            f"labels go up to {int(labels_N.max())} and the teacher has {num_classes} logits; use a teacher of these "
            "classes"
        )
    labels_N, predicted_N = labels_N[finite_N], predicted_N[finite_N]
    permutation = _permutation(labels_N, predicted_N, required_top1, classes)
    is_bad = top1 < required_top1 and _is_no_accident(top1, num_samples, (1 + required_top1) / 2)
    if num_bad_rows < num_samples and (is_bad or permutation is not None):
        facts = f"top-1 is {top1:.1%}, chance {chance:.1%}, required {required_top1:.1%}"
        facts += " on images augmented as for training" if is_augmented else ""
        hint = (
            _constant(predicted_N, classes)
            or _shift(labels_N, predicted_N, required_top1)
            or permutation
            or "the teacher hardly recognizes these images; are its weights loaded, are its classes those of the data, "
            "and was it trained with the mean, std and size of the transform?"
        )
        problems.append(f"{facts}: {hint}")
    return ProbeReport(
        num_samples=num_samples,
        is_augmented=is_augmented,
        top1=top1,
        chance=chance,
        required_top1=required_top1,
        mean_confidence=float(logits_NK[finite_N].softmax(dim=1).amax(dim=1).mean()) if finite_N.any() else None,
        num_bad_rows=num_bad_rows,
        predicted=tuple(predicted_K.tolist()),
        problems=tuple(problems),
    )


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
