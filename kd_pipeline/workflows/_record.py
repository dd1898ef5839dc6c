"""Record a teacher: run it once on all images of a training, and keep its outputs for `backend: recorded`."""

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from kd_pipeline._core.progress import no_report, progress_bar
from kd_pipeline._core.ranks import is_rank_zero, num_nodes
from kd_pipeline._core.settings import require_config
from kd_pipeline._core.terminal_log import log_line, log_to_terminal
from kd_pipeline.batch import KDBatch
from kd_pipeline.config.config import Config
from kd_pipeline.data.plan import BatchPlan, EpochPlan
from kd_pipeline.data.sources import open_source
from kd_pipeline.errors import ConfigError, StateError, TeacherError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.loader.state import changed_fields
from kd_pipeline.loader.verify_recording import require_repeatable
from kd_pipeline.losses.distillation import Distillation
from kd_pipeline.models.registry import open_model
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.encoding import encode
from kd_pipeline.teachers.recorded.files import RecordingReader, RecordingWriter, checksums, create_files
from kd_pipeline.teachers.recorded.manifest import (
    CHECKSUM,
    MANIFEST,
    SAMPLE,
    RecordedOutput,
    RecordingManifest,
    TeacherInfo,
    reason_of,
)
from kd_pipeline.teachers.settings import is_recording
from kd_pipeline.training.distributed import init_distributed, on_rank_zero, set_num_threads
from kd_pipeline.training.run_lock import lock_folder
from kd_pipeline.workflows.record_plan import (
    RecordingPlan,
    RecordSettings,
    existing_bytes,
    free_bytes,
    stored_outputs,
    warn_about_resize,
    with_outputs,
)
from kd_pipeline.workflows.stage import normalization_of, num_classes_for, num_classes_of
from kd_pipeline.workflows.teacher import open_run_teacher

__all__ = ["Progress", "RecordSettings", "RecordingPlan", "plan_recording", "record"]

_logger = logging.getLogger("kd_pipeline")

_COMMIT_INTERVAL_S = 10.0
"""Work that is lost at most if the process is killed."""
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
    """Fraction of the recording that exists, 0 to 1."""
    images_per_s: float
    """Of all processes together, since this one started."""
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
) -> Path:
    """Record the teacher of `config`, or resume an earlier recording in the same folder.

    It may be stopped or killed at any time. Under `torchrun`, on one machine, each process records its part of every
    batch.

    Args:
        config: the training that will use the recording.
        settings: what to keep; defaults to what the config's loss compares, for `train.epochs`, in `run_dir`.
        plugins: modules that factories in the config may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        announce: called with the plan before anything is written; without it the plan is logged, and shown as what
            `train` says.
        report: called every few seconds; without it the lines are logged.

    Returns:
        The folder of the recording, for `teacher.path`.

    Raises:
        ConfigError: the config lacks something, the teacher has no such outputs, or the disk is too small.
        StateError: the folder holds a recording of different images, outputs or of a different teacher; or the disk is
            full or fails.
        DataError, TeacherError: the data or the teacher is not what the config says.
    """
    with _planned(config, settings, plugins, trust_engines) as (loader, plan, opened):
        if is_rank_zero():
            announce(plan)
        on_rank_zero(lambda: _prepare(plan, opened))
        writer = RecordingWriter(plan.folder)
        opened.callback(writer.close)
        _Recorder(loader, writer, plan.manifest.epochs, report).run()
    return plan.folder


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
) -> Iterator[tuple[KDDataLoader, RecordingPlan, ExitStack]]:
    """The open loader, the plan, and the stack that closes everything."""
    require_config(config)
    settings = settings or RecordSettings()
    folder = settings.out or (None if config.run_dir is None else config.run_dir / "recording")
    if folder is None:
        raise ConfigError("a recording needs a folder: set run_dir, such as run_dir: runs/mine, or pass --out")
    if num_nodes() > 1:
        raise ConfigError("a recording is written by the processes of one machine; use torchrun --nnodes 1, srun -N 1")
    init_distributed(config.data.device)
    set_num_threads(config.train.num_threads)
    with ExitStack() as opened:
        loader = _open_loader(config, plugins, trust_engines, opened, begun_with=_runtimes_of(folder))
        assert isinstance(loader.teacher, Teacher)
        settings = with_outputs(settings, config, loader.teacher.outputs)
        grids = _student_grids(config, loader, loader.teacher, plugins) if settings.grid == "student" else {}
        stored = stored_outputs(loader.teacher.outputs, settings, grids)
        warn_about_resize(config, stored)
        manifest = _new_manifest(loader, loader.teacher, stored, settings.epochs or config.train.epochs)
        existing = _existing_manifest(folder, manifest)
        plan = RecordingPlan(
            folder=folder,
            settings=settings,
            teacher_outputs=loader.teacher.outputs,
            student_grids=grids,
            manifest=manifest,
            existing_bytes=existing_bytes(folder, manifest),
            free_bytes=free_bytes(folder),
            num_epochs_done=None if existing is None else existing.epochs_done,
        )
        yield loader, plan, opened


class _Recorder:
    """Records the batches of this process."""

    def __init__(
        self, loader: KDDataLoader, writer: RecordingWriter, epochs: int, report: Callable[[Progress], None]
    ) -> None:
        self._loader, self._writer, self._epochs, self._report = loader, writer, epochs, report
        self._started = self._committed = time.monotonic()
        self._num_images = 0
        self._next_epoch: int | None = None
        """Epoch that the loader runs next, on which DALI is already working."""

    def run(self) -> None:
        """Record all missing rows."""
        self._check_reproducible()
        try:
            for epoch in range(self._writer.manifest.epochs_done, self._epochs):
                self._record(epoch)
                self._writer.commit()
                _barrier()  # all ranks have written their rows
                self._writer.finish_epoch(epoch, save=is_rank_zero())
                self._report_progress(epoch, 1.0)
        finally:
            # After Ctrl-C too.
            self._writer.commit()

    def _record(self, epoch: int) -> None:
        batches = self._loader.plan.epoch(epoch)
        first = _first_missing(batches, self._writer.committed(epoch))
        if first == len(batches):
            return
        if (epoch, first) != (self._next_epoch, 0):
            _move_to(self._loader, epoch, first)
        with progress_bar(f"epoch {epoch + 1} of {self._epochs}") as report_batches:
            for number, batch in enumerate(self._loader, start=first):
                plan = batches[number]
                self._write(epoch, plan, batch)
                report_batches(number + 1, len(batches))
                self._num_images += int(plan.valid.sum()) * self._loader.shard.world_size
                if time.monotonic() - self._committed > _COMMIT_INTERVAL_S:
                    self._writer.commit()
                    self._committed = time.monotonic()
                    if report_batches is no_report:  # which has no terminal
                        self._report_progress(epoch, (number + 1) / len(batches))
        self._next_epoch = epoch + 1

    def _write(self, epoch: int, plan: BatchPlan, batch: KDBatch) -> None:
        num_rows = int(plan.valid.sum())  # without padding, which comes last
        if num_rows:
            rows = _rows(batch, self._writer.manifest)
            rows = {name: column[:num_rows] for name, column in rows.items()}
            self._writer.write(epoch, int(plan.position[0]), rows)

    def _check_reproducible(self) -> None:
        """Run the teacher again on a random batch that was recorded, and compare.

        Raises:
            StateError: the outputs or the images differ.
        """
        manifest = self._writer.manifest
        complete, partial = manifest.epochs_done, 0
        if complete < manifest.epochs:
            partial = _first_missing(self._loader.plan.epoch(complete), self._writer.committed(complete))
        num_recorded = complete * len(self._loader) + partial
        if not num_recorded:
            return
        epoch, number = divmod(int(np.random.default_rng().integers(num_recorded)), len(self._loader))
        plan = self._loader.plan.epoch(epoch)[number]
        _move_to(self._loader, epoch, number)
        num_rows = int(plan.valid.sum())
        new = {name: column[:num_rows] for name, column in _rows(next(iter(self._loader)), manifest).items()}
        reader = RecordingReader(self._writer.folder, manifest)
        old = {name: reader.read(name, epoch, plan.position[:num_rows]) for name in reader.columns}
        reader.close()
        old[SAMPLE] = old[SAMPLE] - 1
        _check_same_rows(old, new, f"batch {number + 1} of epoch {epoch + 1}")

    def _report_progress(self, epoch: int, part: float) -> None:
        if not is_rank_zero() or not self._num_images:
            return
        images_per_s = self._num_images / (time.monotonic() - self._started)
        left = (self._epochs - epoch - part) * self._writer.manifest.num_rows
        done = (epoch + part) / self._epochs
        self._report(Progress(epoch, self._epochs, done, images_per_s, left / images_per_s))


def _prepare(plan: RecordingPlan, opened: ExitStack) -> None:
    """Lock the folder and create the files of the recording, on one rank."""
    plan.require_space()
    opened.enter_context(lock_folder(plan.folder, otherwise="choose a different folder with --out"))
    existing = _existing_manifest(plan.folder, plan.manifest)
    if existing is None or existing.epochs < plan.manifest.epochs:
        epochs_done = 0 if existing is None else existing.epochs_done
        create_files(plan.folder, plan.manifest.model_copy(update={"epochs_done": epochs_done}))


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
    # Samples that training drops are recorded too: the recording works for any batch size and number of ranks.
    last_batch = "pad" if train.last_batch in (None, "drop") else train.last_batch
    # The class list and the unreadable samples of a training in the same folder stay those of the training.
    holds_training = config.run_dir is not None and (config.run_dir / "config.yaml").exists()
    return opened.enter_context(
        KDDataLoader.from_config(
            config,
            teacher=teacher,
            training=source,
            last_batch=last_batch,
            run_dir=None if holds_training else config.run_dir,
        )
    )


def _student_grids(
    config: Config, loader: KDDataLoader, teacher: Teacher, plugins: Collection[str]
) -> dict[str, tuple[int, int]]:
    """Of the student's features that each output is compared with, by a dry run of the loss."""
    if config.student is None:
        raise ConfigError("--grid student is that of the student's features: set student, or give a number")
    num_classes = num_classes_for(config.student, loader.source, teacher)
    distillation = Distillation(
        config.distill,
        student=open_model(config.student, plugins=plugins, num_classes=num_classes, images=normalization_of(loader)),
        teacher_outputs=teacher.outputs,
        example=loader.example(),
        num_classes=num_classes_of(loader.source, teacher),
        plugins=plugins,
    )
    return distillation.student_grids


def _new_manifest(
    loader: KDDataLoader, teacher: Teacher, outputs: dict[str, RecordedOutput], epochs: int
) -> RecordingManifest:
    try:
        return RecordingManifest(
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
            epochs=epochs,
        )
    except ValidationError as exc:
        raise TeacherError(f"the outputs of this teacher cannot be recorded: {reason_of(exc)}") from None


def _runtimes_of(folder: Path) -> Sequence[str] | None:
    """Backend and precision of the teacher of the recording in `folder`, if there is one."""
    if not os.path.exists(folder / MANIFEST):
        return None
    return RecordingManifest.load(folder).teacher.runtimes


def _existing_manifest(folder: Path, new: RecordingManifest) -> RecordingManifest | None:
    """The manifest in `folder`, if there is one.

    Raises:
        StateError: it is of a different recording.
    """
    if not os.path.exists(folder / MANIFEST):  # Path.exists raises for a name that is too long
        return None
    existing = RecordingManifest.load(folder)
    fields, new_fields = (each.model_dump(mode="json", exclude={"epochs", "epochs_done"}) for each in (existing, new))
    changed = changed_fields(fields, new_fields)
    if changed:
        lines = "\n".join(f"  {line}" for line in changed.values())
        raise StateError(
            f"the recording in {folder} is a different one:\n{lines}\n"
            "use the old values to resume it, or choose a different folder with --out"
        )
    return existing


def _first_missing(batches: EpochPlan, committed: NDArray[np.bool_]) -> int:
    """The first batch of this rank with a missing row; `len(batches)` if there is none."""
    missing = np.flatnonzero(~committed)
    if not len(missing):
        return len(batches)
    # Rows are written in the order of the epoch, by each rank for itself.
    for number in range(int(missing[0]) // batches.plan.global_batch_size, len(batches)):
        plan = batches[number]
        if not committed[plan.position[plan.valid]].all():
            return number
    return len(batches)


def _move_to(loader: KDDataLoader, epoch: int, number: int) -> None:
    loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "batch": number})


def _rows(batch: KDBatch, manifest: RecordingManifest) -> dict[str, NDArray[Any]]:
    """A batch as rows of the recording's columns."""
    encoded = encode(batch.teacher, manifest)
    rows: dict[str, NDArray[Any]] = {name: column.cpu().numpy() for name, column in encoded.items()}
    return {**rows, SAMPLE: batch.index.cpu().numpy(), CHECKSUM: checksums(batch.images)}


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


def _barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
