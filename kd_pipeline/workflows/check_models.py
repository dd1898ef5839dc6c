"""Open teacher and student as a training would, and compute its loss on a few images."""

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kd_pipeline._core.constants import IGNORE_INDEX
from kd_pipeline._core.device import resolve_device
from kd_pipeline._core.progress import progress_bar
from kd_pipeline.batch import KDBatch
from kd_pipeline.config.config import Config
from kd_pipeline.data.sources import Source, masks_of
from kd_pipeline.errors import ConfigError, KDPipelineError
from kd_pipeline.evaluation._logits import inputs_for
from kd_pipeline.evaluation._metrics import open_metrics
from kd_pipeline.evaluation.judge import ProbeReport
from kd_pipeline.evaluation.probe import run_probe
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.models.input_adapter import Normalization
from kd_pipeline.models.modules import call_network, zero_images
from kd_pipeline.models.registry import open_model
from kd_pipeline.report.grid import save_grid
from kd_pipeline.teachers.base import Teacher, is_logits
from kd_pipeline.teachers.recorded.recording import Recording
from kd_pipeline.teachers.tensorrt.package import open_tensorrt
from kd_pipeline.workflows.check_images import SKIP_UNREADABLE
from kd_pipeline.workflows.evaluation_plan import EvaluationPlan, select_best
from kd_pipeline.workflows.findings import Findings
from kd_pipeline.workflows.stage import (
    Stage,
    check_config,
    check_sizes,
    loss_settings,
    network_of,
    num_classes_for,
    num_classes_of,
    view_of,
)
from kd_pipeline.workflows.teacher import check_recording, open_run_teacher, starts_without_teacher
from kd_pipeline.workflows.validation import check_probed

__all__ = ["TeacherReport", "check_models"]

_NUM_IMAGES = 8
"""Images for one computation of the loss."""
_WHAT = {"teacher.model": "the network of the teacher", "student": "the student"}


@dataclass(frozen=True, slots=True)
class TeacherReport:
    """The teacher at the start of training."""

    backend: str
    precision: str
    probes: Mapping[str, ProbeReport]
    """Its accuracy on labeled training images, by the name of its logits; empty if there are none."""


def check_models(
    config: Config,
    training: Source | None,
    out: Path,
    *,
    plugins: Collection[str],
    trust_engines: Collection[str],
    labeled: Collection[str],
    findings: Findings,
    report: Callable[[str], object],
) -> tuple[TeacherReport | None, Path | None]:
    """Open teacher and student, draw the first training batch, and add what is wrong with them to `findings`.

    Args:
        config: the run, with `data.train`.
        training: the open source of the split `train`; None if it does not open.
        out: folder of `train_batch.png`.
        plugins: modules that factories in the config may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        labeled: splits with labels, or that do not open.
        findings: gets the problems.
        report: called with lines of progress.

    Returns:
        The teacher, if it opens and fits the images, and the file with the first training batch, if there is one.
    """
    check = _Check(config, training, out, plugins, trust_engines, findings, report)
    with ExitStack() as opened:
        teacher = check.open_teacher(opened)
        if training is not None:
            report("the first training batch")
        batch, grid = check.draw(teacher)
        if training is not None and teacher is not None and batch is None:  # it does not fit the images
            teacher = None
            batch, grid = check.draw(None)
        found = None
        if teacher is not None:
            found = TeacherReport(teacher.backend, teacher.precision, check.probe(teacher))
        check.check_stages(labeled, teacher, batch)
    return found, grid


@dataclass(frozen=True, slots=True)
class _Check:
    """The parts of a check; the fields are arguments of `check_models`."""

    config: Config
    training: Source | None
    out: Path
    plugins: Collection[str]
    trust_engines: Collection[str]
    findings: Findings
    report: Callable[[str], object]

    def open_teacher(self, opened: ExitStack) -> Teacher | Recording | None:
        """The teacher until `opened` closes; None if there is none yet, or it does not open."""
        if self.config.teacher is None or starts_without_teacher(self.config):
            return None
        self.report("the teacher")
        teacher = None
        with self.findings.part("teacher"), progress_bar("the teacher"):
            teacher = _open_teacher(self.config, self.training, self.plugins, self.trust_engines)
            opened.callback(teacher.close)
            if isinstance(teacher, Recording):
                for each in self.config.single_runs.values():
                    check_recording(each, teacher)
            else:
                self.findings.add("error", "teacher", teacher.problems)
        return teacher

    def draw(self, teacher: Teacher | Recording | None) -> tuple[KDBatch | None, Path | None]:
        """The first rows of a training batch with the teacher's outputs, and a picture of it; None if there is none."""
        if self.training is None:
            return None, None
        with self.findings.part("first batch"):
            return _draw(self.config, self.training, self.out, teacher, self.plugins)
        return None, None

    def probe(self, teacher: Teacher | Recording) -> dict[str, ProbeReport]:
        """The teacher's accuracy on training images, by the name of its logits."""
        probes: dict[str, ProbeReport] = {}
        if self.training is None or self.config.probe is None:
            return probes
        self.report("the teacher on training images")
        with self.findings.part("teacher"), progress_bar("the teacher on training images"):
            for output in filter(is_logits, teacher.outputs):
                probe = run_probe(
                    _lenient(self.config, teacher),
                    teacher,
                    self.config.probe,
                    training=self.training,
                    output=output,
                    plugins=self.plugins,
                )
                if probe is not None:
                    probes[output] = probe
                    of = "" if output == "logits" else f"{output}: "
                    self.findings.add("error", "teacher", [f"{of}{problem}" for problem in probe.problems])
        return probes

    def check_stages(
        self, labeled: Collection[str], teacher: Teacher | Recording | None, batch: KDBatch | None
    ) -> None:
        """Check what each stage would measure and train."""
        stages = _stages(self.config)
        if "distill" in stages and self.config.teacher is None:
            message = "stage: distill needs a teacher: set teacher, or use stage: baseline"
            self.findings.add("error", "teacher", [message])
        for stage in stages:
            runs = {"teacher.model": self.config} if stage == "teacher" else self.config.single_runs
            for key, each in runs.items():
                what = _WHAT.get(key, f"the student {key.rpartition('.')[2]}")
                self.report(what)
                with self.findings.part(key), progress_bar(what):
                    _check_evaluation(each, stage, labeled, teacher)
                    _check_student(each, stage, self.training, teacher, batch, self.plugins)


def _stages(config: Config) -> list[Stage]:
    """The stages to check; a config without a student is for a loop of the user's own."""
    stages: tuple[Stage, ...] = ("teacher", "distill") if config.stage == "all" else (config.stage,)
    has_student = config.student is not None or bool(config.students)
    return [stage for stage in stages if stage == "teacher" or has_student]


def _open_teacher(
    config: Config, training: Source | None, plugins: Collection[str], trust_engines: Collection[str]
) -> Teacher | Recording:
    """The teacher, whose problems are reported even if they would stop a run."""
    probe = None if config.probe is None else config.probe.model_copy(update={"strict": False})
    return open_run_teacher(
        config.model_copy(update={"probe": probe}),
        classes=None if training is None else training.classes,
        plugins=plugins,
        trust_engines=trust_engines,
        training=training,
    )


def _lenient(config: Config, teacher: Teacher | Recording | None) -> Config:
    """`config` with substitutes for unreadable images, which a recording does not have unless it was made with them."""
    if isinstance(teacher, Recording):
        return config
    return config.model_copy(update={"data": config.data.model_copy(update=SKIP_UNREADABLE)})


def _draw(
    config: Config, training: Source, out: Path, teacher: Teacher | Recording | None, plugins: Collection[str]
) -> tuple[KDBatch, Path]:
    config = _lenient(config, teacher)
    with KDDataLoader.from_config(
        config, teacher=teacher, training=training, plugins=plugins, run_dir=None, shown_views=config.seen_views
    ) as loader:
        batch = next(iter(loader))
        grid = save_grid(
            batch,
            out / "train_batch.png",
            transform=loader.transform,
            classes=loader.classes,
            ignore_index=loader.ignore_index,
        )
        return _first_rows(batch), grid


def _first_rows(batch: KDBatch) -> KDBatch:
    """A copy of the first images, which outlives the loader."""
    return batch.replace(
        images=batch.images[:_NUM_IMAGES].clone(),
        views={name: view[:_NUM_IMAGES].clone() for name, view in batch.views.items()},
        labels=None if batch.labels is None else batch.labels[:_NUM_IMAGES],
        masks=None if batch.masks is None else batch.masks[:_NUM_IMAGES],
        index=batch.index[:_NUM_IMAGES],
        valid=batch.valid[:_NUM_IMAGES],
        teacher={name: output[:_NUM_IMAGES] for name, output in batch.teacher.items()},
    )


def _check_evaluation(
    config: Config, stage: Stage, labeled: Collection[str], teacher: Teacher | Recording | None
) -> None:
    """Decide what a run would measure.

    Raises:
        ConfigError: the config asks for more.
    """
    check_config(config, stage)
    settings = network_of(config, stage)
    splits = {name for name, each in config.data.splits.items() if getattr(each.source, "masks", None) is not None}
    plan = EvaluationPlan.of(
        config,
        stage,
        labeled=labeled,
        masked=() if settings.is_of_pixels is False else splits,
        has_reference=not isinstance(teacher, Recording),
    )
    select_best(config, stage, plan)


def _check_student(
    config: Config,
    stage: Stage,
    training: Source | None,
    teacher: Teacher | Recording | None,
    batch: KDBatch | None,
    plugins: Collection[str],
) -> None:
    """Do what `train` does before its first step, and compute its first loss.

    Raises:
        ConfigError: what would stop it.
    """
    open_metrics(config.train.metrics, plugins=plugins)
    if (engine := config.train.export.engine) is not None:
        open_tensorrt(engine.runtime)
    settings = network_of(config, stage)
    if training is None and teacher is None:
        return  # which is the error to correct first
    settings = settings.model_copy(update={"pretrained": False})  # no download
    train, view = config.data.split("train"), view_of(config, stage)
    made = config.data.view("train", view)
    student = open_model(
        settings,
        plugins=plugins,
        num_classes=num_classes_for(settings, training, teacher),
        is_trained=True,
        images=Normalization(made.normalize.mean, made.normalize.std),
    )
    check_sizes(student, made)
    example = zero_images(made.image_shape)
    if config.feature_probe is not None and stage != "teacher":
        check_probed(student, example)
    distillation = Distillation(
        loss_settings(config, stage),
        student=student,
        teacher_outputs=None if teacher is None or stage != "distill" else teacher.outputs,
        example=example,
        num_classes=num_classes_of(training, teacher),
        labels_are_soft=train.mix is not None,
        ignore_index=IGNORE_INDEX if (masks := masks_of(training)) is None else masks.ignore_index,
        plugins=plugins,
    )
    if batch is not None:
        _check_loss(distillation, student, batch.of_view(view), config)


@torch.no_grad()
def _check_loss(distillation: Distillation, student: nn.Module, batch: KDBatch, config: Config) -> None:
    """Compute the loss of the untrained student on `batch`.

    Raises:
        ConfigError: it lacks labels or outputs, fails, or is NaN or inf.
    """
    device = resolve_device(config.data.device)
    # Losses of the student's own may be there in training mode only.
    student, distillation = student.to(device).train(bool(config.distill.student_losses)), distillation.to(device)
    with distillation.student_features(student) as features:
        outputs = call_network(student, inputs_for(student, batch.input))
    try:
        found = distillation(outputs, features, batch, epoch=0, epochs=config.train.epochs)
    except KDPipelineError:
        raise
    except Exception as exc:  # a custom loss may raise anything
        raise ConfigError(f"distill: the loss fails on the first {len(batch)} images: {exc}") from exc
    if not found.total.isfinite():
        terms = ", ".join(f"{name} {float(value):g}" for name, value in found.terms.items())
        raise ConfigError(
            f"the first loss is not finite ({terms}); check the student's weights, the teacher's outputs and the "
            "normalization of the images"
        )
