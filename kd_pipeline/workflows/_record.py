"""Record a teacher: run it once over the epochs of the training plan and keep its answers for `backend: recorded`."""

import logging
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from kd_pipeline._core.settings import Settings
from kd_pipeline.batch import KDBatch
from kd_pipeline.config.config import Config
from kd_pipeline.data.plan import BatchPlan, EpochPlan
from kd_pipeline.data.settings import Untaught
from kd_pipeline.data.sources.base import open_source
from kd_pipeline.errors import ConfigError, StateError, TeacherError
from kd_pipeline.loader.loader import KDDataLoader
from kd_pipeline.loader.state import differences
from kd_pipeline.loader.verify_recording import require_repeatable
from kd_pipeline.teachers.class_order import matched
from kd_pipeline.teachers.recorded.files import (
    CHECKSUM,
    MANIFEST,
    SAMPLE,
    Manifest,
    RecordedDtype,
    RecordingWriter,
    TeacherFacts,
    checksums,
    encode,
    make_files,
    open_columns,
)
from kd_pipeline.teachers.recorded.teacher import RecordedTeacher
from kd_pipeline.training.distributed import is_first, join_processes, num_machines, use_cores
from kd_pipeline.workflows.teacher import open_run_teacher

__all__ = ["Progress", "RecordSettings", "record"]

_logger = logging.getLogger("kd_pipeline")

_COMMIT_S = 10.0
"""How often what was written is made to last, at most this much work is done again."""
_ROUNDING = 0.02
"""Largest difference between two answers of one teacher, relative to the largest number of its output: bfloat16 has
eight bits, and another number of images in a call or another processor rounds differently."""
_SMALL_TOP_K = 16
"""What a message proposes where a recording does not fit on the disk."""


class RecordSettings(Settings):
    """What is kept of the answers, for how many epochs, and where."""

    top_k: int | None = Field(default=None, ge=1)
    """Keep the largest logits of an image alone; the other classes share the rest of the probability."""
    dtype: RecordedDtype = "float32"
    """Of the answers in the files; float32 and all logits give a training that ends with the very same weights."""
    epochs: int | None = Field(default=None, ge=1)
    """Epochs to record; `train.epochs` unless given."""
    out: Path | None = None
    """The folder; `recording` in `run_dir` unless given."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a recording is."""

    epoch: int
    """The one that is being recorded."""
    epochs: int
    done: float
    """Part of all that is there; from 0 to 1."""
    images_per_s: float
    """Of all processes together, since this one started."""
    left_s: float
    """Seconds until the end at this speed."""


def record(
    config: Config,
    settings: RecordSettings | None = None,
    *,
    plugins: Collection[str] = (),
    report: Callable[[Progress], None] | None = None,
) -> Path:
    """Record the teacher of `config`, going on where an earlier recording in the same folder was stopped.

    It may be stopped or killed at any time. Under `torchrun` each process answers for its part of every batch, on one
    machine.

    Args:
        config: the training that is to be replayed later.
        settings: what to keep; everything, in `run_dir`, where left out.
        plugins: modules that factories in the config may come from.
        report: is told every few seconds how far it is.

    Returns:
        The folder of the recording, for `teacher.path`.

    Raises:
        ConfigError: the config is not enough, or the disk too small.
        StateError: the folder holds a recording of other images, of another teacher or of other outputs; or the disk
            is full or fails.
        DataError, TeacherError: the data or the teacher is not what the config says.
    """
    settings = settings or RecordSettings()
    folder = settings.out or (None if config.run_dir is None else config.run_dir / "recording")
    if folder is None:
        raise ConfigError("a recording needs a folder: set run_dir, such as run_dir: runs/mine, or pass --out")
    if num_machines() > 1:
        raise ConfigError("a recording is written by the processes of one machine; give torchrun --nnodes 1, srun -N 1")
    join_processes()
    use_cores(config.train.num_threads)
    with ExitStack() as opened:
        loader = _open_loader(config, plugins, opened)
        manifest = _manifest(loader, settings, settings.epochs or config.train.epochs)
        found = _found(folder, manifest)
        if is_first():
            _check_space(folder, manifest)
            if found is None or found.epochs < manifest.epochs:
                make_files(folder, manifest.model_copy(update={"epochs_done": found.epochs_done if found else 0}))
        _meet()
        writer = RecordingWriter(folder)
        opened.callback(writer.close)
        _Recording(loader, writer, manifest.epochs, report).run()
    return folder


class _Recording:
    """One process's part of the work."""

    def __init__(
        self, loader: KDDataLoader, writer: RecordingWriter, epochs: int, report: Callable[[Progress], None] | None
    ) -> None:
        self._loader, self._writer, self._epochs, self._report = loader, writer, epochs, report
        self._started = self._committed = time.monotonic()
        self._num_images = 0
        self._next_epoch: int | None = None
        """Which one the loader runs next by itself, with DALI working on it already."""

    def run(self) -> None:
        """Record what is not there yet."""
        self._check_answers()
        try:
            for epoch in range(self._writer.manifest.epochs_done, self._epochs):
                self._record(epoch)
                self._writer.commit()
                _meet()  # all ranks have written their rows
                self._writer.finish_epoch(epoch, save=is_first())
                self._tell(epoch, 1.0)
        finally:
            # After Ctrl-C too; an error in here must not hide the first.
            self._writer.commit()

    def _record(self, epoch: int) -> None:
        """The rows of an epoch that are not there yet."""
        batches = self._loader.plan.epoch(epoch)
        first = _first_missing(batches, self._writer.marks(epoch))
        if first == len(batches):
            return
        if (epoch, first) != (self._next_epoch, 0):
            _go_to(self._loader, epoch, first)
        for number, batch in enumerate(self._loader, start=first):
            plan = batches[number]
            self._write(epoch, plan, batch)
            self._num_images += int(plan.valid.sum()) * self._loader.shard.world_size
            if time.monotonic() - self._committed > _COMMIT_S:
                self._writer.commit()
                self._committed = time.monotonic()
                self._tell(epoch, (number + 1) / len(batches))
        self._next_epoch = epoch + 1

    def _write(self, epoch: int, plan: BatchPlan, batch: KDBatch) -> None:
        """The rows of one batch; those of padding stand at their own places already."""
        own = int(plan.valid.sum())  # padding comes last
        if own:
            rows = _rows_of(batch, self._writer.manifest)
            self._writer.write(epoch, int(plan.place[0]), {name: column[:own] for name, column in rows.items()})

    def _check_answers(self) -> None:
        """Ask the teacher once more about a batch that is there, drawn at random, and compare.

        Raises:
            StateError: it answers differently, or the images are others.
        """
        manifest = self._writer.manifest
        whole, begun = manifest.epochs_done, 0
        if whole < manifest.epochs:
            begun = _first_missing(self._loader.plan.epoch(whole), self._writer.marks(whole))
        num_there = whole * len(self._loader) + begun
        if not num_there:
            return
        epoch, number = divmod(int(np.random.default_rng().integers(num_there)), len(self._loader))
        plan = self._loader.plan.epoch(epoch)[number]
        _go_to(self._loader, epoch, number)
        now = _rows_of(next(iter(self._loader)), manifest)
        own = int(plan.valid.sum())
        then = {
            name: np.asarray(column[epoch][plan.place[:own]])
            for name, column in open_columns(self._writer.folder, manifest).items()
        }
        then[SAMPLE] = then[SAMPLE] - 1
        _compare(then, {name: column[:own] for name, column in now.items()}, f"batch {number} of epoch {epoch}")

    def _tell(self, epoch: int, part: float) -> None:
        if self._report is None or not is_first() or not self._num_images:
            return
        manifest = self._writer.manifest
        images_per_s = self._num_images / (time.monotonic() - self._started)
        left = (self._epochs - epoch - part) * manifest.num_rows
        done = (epoch + part) / self._epochs
        self._report(Progress(epoch, self._epochs, done, images_per_s, left / images_per_s))


def _open_loader(config: Config, plugins: Collection[str], opened: ExitStack) -> KDDataLoader:
    """The training images with the live teacher, each place of an epoch once."""
    train = config.data.split("train")
    require_repeatable(config.data.hw_decoder_load)
    if config.teacher is None:
        raise ConfigError("there is no teacher to record: set teacher")
    teacher = open_run_teacher(config, plugins=plugins)
    opened.callback(teacher.close)
    if isinstance(teacher, RecordedTeacher):
        raise ConfigError(f"the teacher is a recording already: {teacher.path}; record the teacher that made it")
    source = open_source(train.source)
    # What a training drops is recorded too, so that the recording serves any batch size and number of ranks.
    train = train.model_copy(update={"last_batch": "pad" if train.last_batch in (None, "drop") else train.last_batch})
    data = config.data.with_split("train", train)
    untaught = Untaught(config.seed, data, config.run_dir)
    loader = KDDataLoader.from_config(untaught, "train", teacher=matched(teacher, source.classes), training=source)
    return opened.enter_context(loader)


def _manifest(loader: KDDataLoader, settings: RecordSettings, epochs: int) -> Manifest:
    """Of a new recording."""
    teacher = loader.teacher
    assert teacher is not None
    outputs = {name: tuple(size or 0 for size in spec.shape[1:]) for name, spec in teacher.outputs.items()}
    if unknown := [name for name, shape in outputs.items() if 0 in shape]:
        raise TeacherError(f"the shape of the teacher's {unknown[0]!r} is not fixed; export it with fixed sizes")
    num_classes = outputs["logits"][0]
    if settings.top_k is not None and settings.top_k >= num_classes:
        raise ConfigError(
            f"--top-k must be below the number of classes, got {settings.top_k} of {num_classes}; leave it out for all"
        )
    return Manifest(
        teacher=TeacherFacts.of(teacher),
        outputs=outputs,
        top_k=settings.top_k,
        dtype=settings.dtype,
        stream=loader.stream_fingerprint,
        num_rows=len(loader.source),
        epochs=epochs,
    )


def _found(folder: Path, wanted: Manifest) -> Manifest | None:
    """The manifest of a recording that is there, once it is known to be of the same."""
    if not (folder / MANIFEST).exists():
        return None
    found = Manifest.load(folder)
    different = differences(_facts(found), _facts(wanted))
    if different:
        lines = "\n".join(f"  {line}" for line in different.values())
        raise StateError(
            f"the recording in {folder} is another one:\n{lines}\n"
            "go on with the old values, or choose another folder with --out"
        )
    return found


def _facts(manifest: Manifest) -> Mapping[str, Any]:
    facts: Mapping[str, Any] = manifest.model_dump(mode="json", exclude={"epochs", "epochs_done"})
    return facts


def _check_space(folder: Path, manifest: Manifest) -> None:
    """Refuse a recording that does not fit on the disk.

    Raises:
        ConfigError: says what it needs, what is free and what less would need.
    """
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    needed, free = manifest.num_bytes - _allocated(folder, manifest), shutil.disk_usage(there).free
    if needed <= free:
        return
    small = {"top_k": _SMALL_TOP_K if manifest.outputs["logits"][0] > _SMALL_TOP_K else None, "dtype": "float16"}
    smaller = manifest.model_copy(update=small)
    options = f"{'' if smaller.top_k is None else f'--top-k {_SMALL_TOP_K} '}--dtype float16"
    raise ConfigError(
        f"the recording needs {_size(needed)} more in {folder} ({manifest.num_rows} images x {manifest.epochs} epochs "
        f"x {manifest.row_bytes} bytes) and {_size(free)} are free; {options} would need {_size(smaller.num_bytes)} in "
        "all. Or record fewer epochs with --epochs, or choose another disk with --out"
    )


def _allocated(folder: Path, manifest: Manifest) -> int:
    """Bytes on the disk of the files that are there."""
    files = [folder / column.file for column in manifest.columns.values()]
    return sum(file.stat().st_blocks * 512 for file in files if file.exists())


def _size(num_bytes: int) -> str:
    size, units = float(num_bytes), ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def _first_missing(batches: EpochPlan, marks: NDArray[np.bool_]) -> int:
    """The first batch of this rank of which a row is not there; `len(batches)` where all are."""
    missing = np.flatnonzero(~marks)
    if not len(missing):
        return len(batches)
    # Rows are written in the order of the epoch, by each rank for itself.
    for number in range(int(missing[0]) // batches.plan.global_batch_size, len(batches)):
        plan = batches[number]
        if not marks[plan.place[plan.valid]].all():
            return number
    return len(batches)


def _go_to(loader: KDDataLoader, epoch: int, number: int) -> None:
    loader.load_state_dict({**loader.state_dict(), "epoch": epoch, "batch": number})


def _rows_of(batch: KDBatch, manifest: Manifest) -> dict[str, NDArray[Any]]:
    """A batch as rows of the recording's columns."""
    encoded = encode(batch.teacher, manifest)
    rows: dict[str, NDArray[Any]] = {name: column.cpu().numpy() for name, column in encoded.items()}
    return {**rows, SAMPLE: batch.index.cpu().numpy(), CHECKSUM: checksums(batch.images)}


def _compare(then: Mapping[str, NDArray[Any]], now: Mapping[str, NDArray[Any]], what: str) -> None:
    for name in (SAMPLE, CHECKSUM):
        if (then[name] != now[name]).any():
            row = int(np.flatnonzero(then[name] != now[name])[0])
            raise StateError(
                f"the images are not those of the recording: in {what}, the {name} in row {row} was {then[name][row]} "
                f"and is {now[name][row]}; a file has changed, or it is decoded differently here. Record anew in "
                "another folder with --out"
            )
    worst = 0.0
    for name, recorded in then.items():
        # Of two classes with nearly the same logit either may be the last that is kept.
        if name in (SAMPLE, CHECKSUM, "logits.classes"):
            continue
        old, new = recorded.astype(np.float64), now[name].astype(np.float64)
        with np.errstate(invalid="ignore"):
            difference = np.where((old == new) | (np.isnan(old) & np.isnan(new)), 0.0, np.abs(old - new))
        scale = np.abs(old[np.isfinite(old)]).max(initial=1e-6)
        if not difference.max() <= _ROUNDING * scale:
            raise StateError(
                f"the teacher does not answer as it did: in {what}, its {name.removesuffix('.values')} differ by up to "
                f"{difference.max():.3g} and are at most {scale:.3g}; something that runs it has changed. Record anew "
                "in another folder with --out"
            )
        worst = max(worst, float(difference.max()))
    if worst:
        _logger.warning(
            "the teacher rounds differently from before, by up to %.2g; with the same batch size, processor and "
            "packages the recording would be the same to the bit",
            worst,
        )


def _meet() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
