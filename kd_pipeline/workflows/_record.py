"""Record a teacher: run it once on all images of a training, and keep its outputs for `backend: recorded`."""

import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from kd_pipeline._core.ranks import is_rank_zero, num_nodes
from kd_pipeline._core.settings import Settings
from kd_pipeline.batch import KDBatch
from kd_pipeline.config.config import Config
from kd_pipeline.data.plan import BatchPlan, EpochPlan
from kd_pipeline.data.sources import open_source
from kd_pipeline.errors import ConfigError, StateError, TeacherError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.loader.state import changed_fields
from kd_pipeline.loader.verify_recording import require_repeatable
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.files import RecordingReader, RecordingWriter, checksums, create_files, encode
from kd_pipeline.teachers.recorded.manifest import (
    CHECKSUM,
    MANIFEST,
    SAMPLE,
    RecordedDtype,
    RecordingManifest,
    TeacherInfo,
    reason_of,
)
from kd_pipeline.teachers.settings import is_recording
from kd_pipeline.training.distributed import init_distributed, on_rank_zero, set_num_threads
from kd_pipeline.training.run_lock import lock_folder
from kd_pipeline.workflows.teacher import open_run_teacher

__all__ = ["Progress", "RecordSettings", "record"]

_logger = logging.getLogger("kd_pipeline")

_COMMIT_INTERVAL_S = 10.0
"""Work that is lost at most if the process is killed."""
_ROUNDING = 0.02
"""Largest difference between two runs of one teacher, relative to the largest number of the output: bfloat16 has eight
bits, and a different batch size or processor rounds differently."""
_SMALL_TOP_K = 16
"""Suggested by the message about a full disk."""


class RecordSettings(Settings):
    """Which outputs to keep, for how many epochs, and where."""

    top_k: int | None = Field(default=None, ge=1)
    """Keep only the largest logits of an image; the other classes share the rest of the probability."""
    dtype: RecordedDtype = "float32"
    """Of the outputs in the files. Training with float32 and all logits gives exactly the weights of a live teacher."""
    epochs: int | None = Field(default=None, ge=1)
    """Epochs to record; defaults to `train.epochs`."""
    out: Path | None = None
    """The folder; defaults to `recording` in `run_dir`."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a recording."""

    epoch: int
    """The current epoch."""
    epochs: int
    done: float
    """Fraction of the recording that exists, 0 to 1."""
    images_per_s: float
    """Of all processes together, since this one started."""
    left_s: float
    """Estimated seconds until the end."""


def record(
    config: Config,
    settings: RecordSettings | None = None,
    *,
    plugins: Collection[str] = (),
    trust_engines: Collection[str] = (),
    report: Callable[[Progress], None] | None = None,
) -> Path:
    """Record the teacher of `config`, or resume an earlier recording in the same folder.

    It may be stopped or killed at any time. Under `torchrun`, on one machine, each process records its part of every
    batch.

    Args:
        config: the training that will use the recording.
        settings: what to keep; defaults to everything, in `run_dir`.
        plugins: modules that factories in the config may come from.
        trust_engines: sha256 of engines to load whoever wrote them, as in `open_teacher`.
        report: called every few seconds.

    Returns:
        The folder of the recording, for `teacher.path`.

    Raises:
        ConfigError: the config lacks something, or the disk is too small.
        StateError: the folder holds a recording of different images, outputs or of a different teacher; or the disk is
            full or fails.
        DataError, TeacherError: the data or the teacher is not what the config says.
    """
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
        manifest = _new_manifest(loader, settings, settings.epochs or config.train.epochs)
        _existing_manifest(folder, manifest)
        on_rank_zero(lambda: _prepare(folder, manifest, opened))
        writer = RecordingWriter(folder)
        opened.callback(writer.close)
        _Recorder(loader, writer, manifest.epochs, report).run()
    return folder


class _Recorder:
    """Records the batches of this process."""

    def __init__(
        self, loader: KDDataLoader, writer: RecordingWriter, epochs: int, report: Callable[[Progress], None] | None
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
        for number, batch in enumerate(self._loader, start=first):
            plan = batches[number]
            self._write(epoch, plan, batch)
            self._num_images += int(plan.valid.sum()) * self._loader.shard.world_size
            if time.monotonic() - self._committed > _COMMIT_INTERVAL_S:
                self._writer.commit()
                self._committed = time.monotonic()
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
        _check_same_rows(old, new, f"batch {number} of epoch {epoch}")

    def _report_progress(self, epoch: int, part: float) -> None:
        if self._report is None or not is_rank_zero() or not self._num_images:
            return
        images_per_s = self._num_images / (time.monotonic() - self._started)
        left = (self._epochs - epoch - part) * self._writer.manifest.num_rows
        done = (epoch + part) / self._epochs
        self._report(Progress(epoch, self._epochs, done, images_per_s, left / images_per_s))


def _prepare(folder: Path, manifest: RecordingManifest, opened: ExitStack) -> None:
    """Lock the folder and create the files of the recording, on one rank."""
    _check_space(folder, manifest)
    opened.enter_context(lock_folder(folder, otherwise="choose a different folder with --out"))
    existing = _existing_manifest(folder, manifest)
    if existing is None or existing.epochs < manifest.epochs:
        epochs_done = 0 if existing is None else existing.epochs_done
        create_files(folder, manifest.model_copy(update={"epochs_done": epochs_done}))


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
    source = open_source(train.source)
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


def _new_manifest(loader: KDDataLoader, settings: RecordSettings, epochs: int) -> RecordingManifest:
    teacher = loader.teacher
    assert isinstance(teacher, Teacher)
    outputs = {name: tuple(size or 0 for size in spec.shape[1:]) for name, spec in teacher.outputs.items()}
    if unknown := [name for name, shape in outputs.items() if 0 in shape]:
        raise TeacherError(f"the shape of the teacher's {unknown[0]!r} is not fixed; export it with fixed sizes")
    num_classes = outputs["logits"][0]
    if settings.top_k is not None and settings.top_k >= num_classes:
        raise ConfigError(
            f"--top-k must be below the number of classes, got {settings.top_k} of {num_classes}; leave it out for all"
        )
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
            top_k=settings.top_k,
            dtype=settings.dtype,
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


def _check_space(folder: Path, manifest: RecordingManifest) -> None:
    """Refuse a recording that does not fit on the disk.

    Raises:
        ConfigError: says how much it needs, how much is free and how much a smaller one would need.
    """
    parent = next(each for each in (folder.absolute(), *folder.absolute().parents) if os.path.isdir(each))
    needed, free = manifest.num_bytes - _allocated_bytes(folder, manifest), shutil.disk_usage(parent).free
    if needed <= free:
        return
    small = {"top_k": _SMALL_TOP_K if manifest.outputs["logits"][0] > _SMALL_TOP_K else None, "dtype": "float16"}
    smaller = manifest.model_copy(update=small)
    options = f"{'' if smaller.top_k is None else f'--top-k {_SMALL_TOP_K} '}--dtype float16"
    raise ConfigError(
        f"the recording needs {_size(needed)} more in {folder} ({manifest.num_rows} images x {manifest.epochs} epochs "
        f"x {manifest.row_bytes} bytes) and {_size(free)} are free; {options} would need {_size(smaller.num_bytes)} in "
        "all. Or record fewer epochs with --epochs, or use a different disk with --out"
    )


def _allocated_bytes(folder: Path, manifest: RecordingManifest) -> int:
    files = [folder / column.file for column in manifest.columns.values()]
    return sum(file.stat().st_blocks * 512 for file in files if file.exists())


def _size(num_bytes: int) -> str:
    size, units = float(num_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


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
        if name in (SAMPLE, CHECKSUM, "logits.classes"):
            continue
        before, after = old[name].astype(np.float64), new[name].astype(np.float64)
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


def _barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
