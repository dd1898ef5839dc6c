"""Record a teacher: run it once on all images of a training, and keep its outputs for `backend: recorded`."""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from kd_pipeline._core.progress import no_report, progress_bar
from kd_pipeline._core.ranks import is_rank_zero
from kd_pipeline._core.settings import require_config
from kd_pipeline._core.terminal_log import log_line, log_to_terminal
from kd_pipeline.batch import KDBatch
from kd_pipeline.config.config import Config
from kd_pipeline.data.plan import Shard
from kd_pipeline.data.sources import open_source
from kd_pipeline.data.span_plan import SpanPlan
from kd_pipeline.errors import ConfigError, StateError, TeacherError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.loader.state import changed_fields
from kd_pipeline.loader.verify_recording import require_repeatable
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.models.registry import open_model
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.checksums import checksums
from kd_pipeline.teachers.recorded.encoding import encode
from kd_pipeline.teachers.recorded.folder import LocalFolder
from kd_pipeline.teachers.recorded.join import join_recording
from kd_pipeline.teachers.recorded.location import AnyFolder, open_folder
from kd_pipeline.teachers.recorded.manifest import (
    CHECKSUM,
    SAMPLE,
    RecordedOutput,
    RecordingManifest,
    TeacherInfo,
    reason_of,
)
from kd_pipeline.teachers.recorded.writer import RecordingWriter
from kd_pipeline.teachers.settings import is_recording
from kd_pipeline.training.distributed import set_num_threads, set_own_gpu
from kd_pipeline.workflows.record_plan import (
    RecordingPlan,
    RecordSettings,
    free_bytes,
    recording_path,
    stored_outputs,
    warn_about_resize,
    with_outputs,
)
from kd_pipeline.workflows.record_share import Share
from kd_pipeline.workflows.stage import normalization_of, num_classes_for, num_classes_of
from kd_pipeline.workflows.teacher import open_run_teacher

__all__ = ["Progress", "RecordSettings", "RecordingPlan", "plan_recording", "record"]

_logger = logging.getLogger("kd_pipeline")

_COMMIT_INTERVAL_S = 10.0
"""Work that is lost at most if the process is killed."""
_MAX_PART_ROWS, _MAX_PART_BYTES = 8192, 2**27
"""Of a part, which is in memory until it is written; but a part has at least one batch."""
_ROUNDING = 0.02
"""Largest difference between two runs of one teacher, relative to the largest number of the output: bfloat16 has eight
bits, and a different batch size or processor rounds differently."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a recording."""

    epoch: int
    """The current epoch, counted from 0."""
    epochs: int
    done: float
    """Fraction of what this process records that exists, 0 to 1."""
    images_per_s: float
    """Of this process, since it started."""
    left_s: float
    """Estimated seconds until the end."""

    @property
    def line(self) -> str:
        """All of it for people."""
        minutes, seconds = divmod(round(self.left_s), 60)
        return (
            f"epoch {self.epoch + 1} of {self.epochs}: {self.done:.1%} recorded, {self.images_per_s:.0f} images/s, "
            f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"
        )


@log_to_terminal()
def record(
    config: Config,
    settings: RecordSettings | None = None,
    *,
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
    announce: Callable[[RecordingPlan], None] = lambda plan: log_line("\n".join(plan.lines)),
    report: Callable[[Progress], None] = lambda progress: log_line(progress.line),
) -> Path | str:
    """Record the teacher of `config`, or resume an earlier recording in the same folder.

    It may be stopped or killed at any time. Any number of processes on any machines may record into one folder: those
    of `torchrun`, `srun` or `mpirun`, the tasks of a SLURM array, and those with a `part` of their own. Each records
    every n-th part, in the batches of a single process, and none waits for another.

    Args:
        config: the training that will use the recording.
        settings: what to keep; defaults to what the config's loss compares, for `train.epochs`, in `run_dir`.
        plugins: modules that factories in the config may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        announce: called with the plan before anything is written; without it the plan is logged, and shown as what
            `train` says.
        report: called every few seconds; without it the lines are logged.

    Returns:
        The folder of the recording, or its URL, for `teacher.path`.

    Raises:
        ConfigError: the config lacks something, the teacher has no such outputs, or the disk is too small.
        StateError: the folder holds a recording of different images, outputs or of a different teacher; or the disk is
            full or fails.
        DataError, TeacherError: the data or the teacher is not what the config says.
    """
    with _planned(config, settings, plugins, trust_engines) as (loader, plan, folder):
        if is_rank_zero():
            announce(plan)
        plan.require_space()
        manifest = folder.find_manifest() or folder.create(plan.manifest)
        _require_same(folder, manifest, plan.manifest)  # by now another process may have written one
        _Recorder(loader, RecordingWriter(folder, manifest), plan, report).run()
    path = recording_path(config, settings or RecordSettings())
    join_recording(path, plan.epochs, license=plan.settings.license)
    return path


def plan_recording(
    config: Config,
    settings: RecordSettings | None = None,
    *,
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
) -> RecordingPlan:
    """What `record` would do with the same arguments, which are its own; nothing is written to the folder.

    `RecordingPlan.require_space` says whether it fits.

    Raises:
        ConfigError, StateError, DataError, TeacherError: as `record`, but for the size of the disk.
    """
    with _planned(config, settings, plugins, trust_engines) as (_, plan, _):
        return plan


@contextmanager
def _planned(
    config: Config, settings: RecordSettings | None, plugins: Collection[str], trust_engines: Collection[str]
) -> Iterator[tuple[KDDataLoader, RecordingPlan, AnyFolder]]:
    """The open loader, the plan and the folder."""
    require_config(config)
    settings = settings or RecordSettings()
    folder = open_folder(recording_path(config, settings))
    share = Share.of_process(settings.part)
    set_own_gpu(config.data.device)
    set_num_threads(config.train.num_threads)
    existing = folder.find_manifest()
    begun_with = None if existing is None else existing.teacher.runtimes
    with ExitStack() as opened:
        loader = _open_loader(config, plugins, trust_engines, opened, begun_with)
        assert isinstance(loader.teacher, Teacher)
        settings = with_outputs(settings, config, loader.teacher.outputs)
        grids = _student_grids(config, loader, loader.teacher, plugins) if settings.grid == "student" else {}
        stored = stored_outputs(loader.teacher.outputs, settings, grids)
        warn_about_resize(config, stored)
        manifest = _new_manifest(loader, loader.teacher, stored)
        if existing is not None:
            _require_same(folder, existing, manifest)
            manifest = existing
        yield (
            loader,
            RecordingPlan(
                folder=folder.path if isinstance(folder, LocalFolder) else str(folder),
                settings=settings,
                teacher_outputs=loader.teacher.outputs,
                student_grids=grids,
                manifest=manifest,
                epochs=settings.epochs or config.train.epochs,
                share=share,
                existing=None if existing is None else folder.find_parts(existing, listed=False),
                free_bytes=free_bytes(folder.path) if isinstance(folder, LocalFolder) else None,
            ),
            folder,
        )


class _Recorder:
    """Records the parts of this process that are missing."""

    def __init__(
        self, loader: KDDataLoader, writer: RecordingWriter, plan: RecordingPlan, report: Callable[[Progress], None]
    ) -> None:
        self._loader, self._writer, self._report, self._epochs = loader, writer, report, plan.epochs
        self._own, self._plan = plan.own_parts, loader.plan
        self._started = self._committed = time.monotonic()
        self._num_recorded = self._num_missing = 0
        """Images, since the start."""

    def run(self) -> None:
        """Record all missing rows."""
        self._check_reproducible()
        spans = self._writer.missing_spans(self._own)
        self._num_missing = sum(stop - start for each in spans.values() for start, stop in each)
        plan = SpanPlan.of(self._plan, spans)
        self._loader.follow(plan)
        try:
            for epoch in spans:
                self._record(epoch, plan.batch_spans(epoch))
                self._report_progress(epoch)
        finally:
            # After Ctrl-C too.
            self._writer.commit()

    def _record(self, epoch: int, spans: Sequence[tuple[int, int]]) -> None:
        self._loader.set_epoch(epoch)
        with progress_bar(f"epoch {epoch + 1} of {self._epochs}") as report_batches:
            for number, (batch, (first, stop)) in enumerate(zip(self._loader, spans, strict=True), start=1):
                self._writer.write(epoch, first, _rows(batch, self._writer.manifest, stop - first))
                report_batches(number, len(spans))
                self._num_recorded += stop - first
                if time.monotonic() - self._committed > _COMMIT_INTERVAL_S:
                    self._writer.commit()
                    self._committed = time.monotonic()
                    if report_batches is no_report and number < len(spans):  # which has no terminal
                        self._report_progress(epoch)

    def _check_reproducible(self) -> None:
        """Run the teacher again on a random batch that was recorded, by whatever process, and compare.

        Raises:
            StateError: the outputs or the images differ.
        """
        found = self._writer.random_rows(self._plan.batch_size)
        if found is None:
            return
        epoch, first, old = found
        stop = first + len(old[SAMPLE])
        self._loader.follow(SpanPlan.of(self._plan, {epoch: [(first, stop)]}))
        self._loader.set_epoch(epoch)
        new = _rows(self._loader.peek(), self._writer.manifest, stop - first)
        _check_same_rows(old, new, f"positions {first}-{stop - 1} of epoch {epoch + 1}")

    def _report_progress(self, epoch: int) -> None:
        if not is_rank_zero() or not self._num_recorded:
            return
        images_per_s = self._num_recorded / (time.monotonic() - self._started)
        num_own = sum(map(self._num_rows, self._own))
        left = self._num_missing - self._num_recorded
        self._report(Progress(epoch, self._epochs, 1 - left / num_own, images_per_s, left / images_per_s))

    def _num_rows(self, part: tuple[int, int]) -> int:
        return self._writer.manifest.part_stop(part[1]) - part[1]


def _open_loader(
    config: Config,
    plugins: Collection[str],
    trust_engines: Collection[str],
    opened: ExitStack,
    begun_with: Sequence[str] | None,
) -> KDDataLoader:
    """The training images with the live teacher, and every position of an epoch once."""
    train = config.data.split("train")
    require_repeatable(config.data.hw_decoder_load)
    if config.teacher is None:
        raise ConfigError("there is no teacher to record: set teacher")
    if is_recording(config.teacher):
        raise ConfigError(
            f"the teacher is a recording already: {config.teacher.path}; record the teacher that it was made with"
        )
    source = open_source(train.source, plugins=plugins)
    teacher = open_run_teacher(
        config,
        classes=source.classes,
        plugins=plugins,
        trust_engines=trust_engines,
        training=source,
        begun_with=begun_with,
    )
    opened.callback(teacher.close)
    assert isinstance(teacher, Teacher)  # no recording
    # Samples that training drops are recorded too: the recording works for any batch size and number of ranks.
    last_batch = "pad" if train.last_batch in (None, "drop") else train.last_batch
    # The class list and the unreadable samples of a training in the same folder stay those of the training.
    holds_training = config.run_dir is not None and (config.run_dir / "config.yaml").exists()
    return opened.enter_context(
        KDDataLoader.from_config(
            config,
            teacher=teacher,
            training=source,
            shard=Shard(),  # processes share parts, and no batch
            last_batch=last_batch,
            plugins=plugins,
            run_dir=None if holds_training else config.run_dir,
            shown_views=teacher.views,
        )
    )


def _student_grids(
    config: Config, loader: KDDataLoader, teacher: Teacher, plugins: Collection[str]
) -> dict[str, tuple[int, int]]:
    """Of the student's features that each output is compared with, by a dry run of the loss.

    Raises:
        ConfigError: there is no student, or several that compare an output at different sizes.
    """
    found: dict[str, tuple[int, int]] = {}
    for key, each in config.single_runs.items():
        if each.student is None:
            raise ConfigError("--grid student is that of the student's features: set student, or give a number")
        num_classes = num_classes_for(each.student, loader.source, teacher)
        view = each.student.view
        images = normalization_of(loader, view)
        distillation = Distillation(
            each.distill,
            student=open_model(each.student, plugins=plugins, num_classes=num_classes, images=images),
            teacher_outputs=teacher.outputs,
            example=loader.example(view),
            num_classes=num_classes_of(loader.source, teacher),
            plugins=plugins,
        )
        for name, grid in distillation.student_grids.items():
            if found.setdefault(name, grid) != grid:
                raise ConfigError(
                    f"--grid student: {key} compares {name} at {grid[0]} x {grid[1]}, and another student at "
                    f"{found[name][0]} x {found[name][1]}; give a number"
                )
    return found


def _new_manifest(loader: KDDataLoader, teacher: Teacher, outputs: dict[str, RecordedOutput]) -> RecordingManifest:
    try:
        manifest = RecordingManifest(
            teacher=TeacherInfo(
                fingerprint=teacher.fingerprint,
                backend=teacher.backend,
                precision=teacher.precision,
                runtimes=teacher.runtimes,
                classes=teacher.classes,
            ),
            outputs=outputs,
            stream=loader.stream_fingerprint,
            num_rows=len(loader.source),
            part_rows=len(loader.source),
        )
        part_rows = _part_rows(manifest, loader.batch_size)
        return RecordingManifest.model_validate({**dict(manifest), "part_rows": part_rows})
    except ValidationError as exc:
        raise TeacherError(f"the outputs of this teacher cannot be recorded: {reason_of(exc)}") from None


def _part_rows(manifest: RecordingManifest, batch_size: int) -> int:
    """Rows of a part: whole batches, so that a training with this batch size replays the batches of its teacher."""
    return max(1, min(_MAX_PART_ROWS, _MAX_PART_BYTES // manifest.row_bytes) // batch_size) * batch_size


def _require_same(folder: AnyFolder, existing: RecordingManifest, new: RecordingManifest) -> None:
    """Refuse to resume a different recording.

    Raises:
        StateError: the manifest in `folder` is of one.
    """
    fields, new_fields = (each.model_dump(mode="json", exclude={"part_rows"}) for each in (existing, new))
    changed = changed_fields(fields, new_fields)
    if changed:
        lines = "\n".join(f"  {line}" for line in changed.values())
        raise StateError(
            f"the recording in {folder} is a different one:\n{lines}\n"
            "use the old values to resume it, or choose a different folder with --out"
        )


def _rows(batch: KDBatch, manifest: RecordingManifest, num_rows: int) -> dict[str, NDArray[Any]]:
    """The first rows of a batch as rows of the recording's columns, without padding, which comes last."""
    encoded = encode(batch.teacher, manifest)
    rows: dict[str, NDArray[Any]] = {name: column.cpu().numpy() for name, column in encoded.items()}
    rows |= {SAMPLE: batch.index.cpu().numpy() + 1, CHECKSUM: checksums(batch.view(manifest.view))}
    return {name: column[:num_rows] for name, column in rows.items()}


def _check_same_rows(old: Mapping[str, NDArray[Any]], new: Mapping[str, NDArray[Any]], what: str) -> None:
    """Refuse rows that differ by more than rounding, and warn about rounding."""
    for name in (SAMPLE, CHECKSUM):
        if (old[name] != new[name]).any():
            row = int(np.flatnonzero(old[name] != new[name])[0])
            raise StateError(
                f"the images are not those of the recording: in {what}, the {name} in row {row} was {old[name][row]} "
                f"and is {new[name][row]}; a file has changed, or it is decoded differently here. Record again in a "
                "different folder with --out"
            )
    worst = 0.0
    for name in old:
        # Of two classes with nearly the same logit, either may be the last one that is kept.
        if name in (SAMPLE, CHECKSUM) or name.endswith((".classes", ".scale")):
            continue
        before, after = (_numbers(name, columns) for columns in (old, new))
        with np.errstate(invalid="ignore"):
            equal = (before == after) | (np.isnan(before) & np.isnan(after))
            difference = np.where(equal, 0.0, np.abs(before - after))
        scale = np.abs(before[np.isfinite(before)]).max(initial=1e-6)
        if not difference.max() <= _ROUNDING * scale:
            raise StateError(
                f"the teacher's outputs have changed: in {what}, its {name.removesuffix('.values')} differ by up to "
                f"{difference.max():.3g} and are at most {scale:.3g}; its runtime or hardware has changed. Record "
                "again in a different folder with --out"
            )
        worst = max(worst, float(difference.max()))
    if worst:
        _logger.warning(
            "the teacher rounds differently from before, by up to %.2g; with the same batch size, processor and "
            "packages the recording would be the same to the bit",
            worst,
        )


def _numbers(name: str, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """A column in float64; of int8, the numbers that it stands for."""
    values = columns[name].astype(np.float64)
    scale = columns.get(f"{name.removesuffix('.values')}.scale")
    if scale is None:
        return values
    numbers: NDArray[np.float64] = values * np.expand_dims(scale, 1 if values.ndim == 4 else -1)
    return numbers
