"""The start-up probe: how well does the teacher classify the training images, as the loader delivers them?"""

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.settings import Settings
from kd_pipeline.batch import KDBatch
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.settings import SplitSettings
from kd_pipeline.data.sources import Source, open_source
from kd_pipeline.data.transforms import TrainTransform
from kd_pipeline.errors import StateError, TeacherError
from kd_pipeline.evaluation.judge import ProbeReport, judge
from kd_pipeline.loader.batch_loader import AnyLoader, BatchLoader
from kd_pipeline.loader.config_split import EACH_IMAGE_ONCE
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.teachers.base import Teacher, is_logits
from kd_pipeline.teachers.outputs_check import probability_problem
from kd_pipeline.teachers.recorded.recording import Recording

if TYPE_CHECKING:
    from kd_pipeline.config.config import Config

__all__ = ["FirstBatches", "ProbeSettings", "probe_teacher", "run_probe"]

_logger = logging.getLogger("kd_pipeline")


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
            continue
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
                report = judge(labels_N, logits_NK, settings.min_factor, self._classes, is_augmented=is_augmented)
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
    if (reason := _reason_to_skip(teacher, output, training, train)) is not None:
        _logger.info("teacher probe%s: skipped, because %s", _of(output), reason)
        return None
    assert training.labels is not None
    if isinstance(teacher, Recording):
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
    report = judge(
        labels_N,
        logits_NK,
        settings.min_factor,
        training.classes,
        is_augmented=isinstance(train.transform, TrainTransform),
    )
    return _with_probability_problem(report, logits_NK, teacher)


def _reason_to_skip(teacher: Teacher | Recording, output: str, training: Source, train: SplitSettings) -> str | None:
    """Why an output cannot be compared with labels."""
    if training.labels is None:
        return "the training data has no labels"
    if output not in teacher.outputs:
        return f"the teacher has no {output}"
    if len(teacher.outputs[output].shape) != 2:
        return f"the teacher's {output} are of pixels, and labels of images"
    if isinstance(teacher, Recording) and train.mix is not None:
        return "the recording is of mixed images, which have no single label"
    return None


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
