"""What is done to every batch of a loader of the user's own: to the device, through the teacher, into a `KDBatch`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_pipeline.batch import KDBatch, map_tensors
from kd_pipeline.data.plan import Shard
from kd_pipeline.errors import ConfigError, DataError, TeacherError
from kd_pipeline.loader.batch_epoch import tensors_in
from kd_pipeline.loader.batch_fields import FieldNames, read_fields
from kd_pipeline.loader.process import OwnProcess
from kd_pipeline.loader.streams import StreamSync
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.class_order import match_classes
from kd_pipeline.teachers.open import open_teacher
from kd_pipeline.teachers.settings import AnyTeacherSettings, TeacherSettings, is_recording, views_of

__all__ = ["AnyTeacher", "BatchPreparation"]

AnyTeacher = Teacher | nn.Module | AnyTeacherSettings
"""An open teacher, or one that is opened for the first batch."""


class BatchPreparation:
    """Makes batches, and keeps two rows of the first one."""

    def __init__(
        self,
        names: FieldNames,
        teacher: AnyTeacher | None,
        change: Callable[[KDBatch], KDBatch] | None,
        *,
        classes: tuple[str, ...] | None,
        num_own_rows: int | None,
        device: torch.device,
        sync: StreamSync,
        reads_ahead: bool,
    ) -> None:
        """Check the teacher; see `BatchLoader` for the arguments.

        Rows of an epoch after `num_own_rows`, if it is given, are not valid, as another process has them too. If it
        reads ahead, batches have memory of their own, as the user's loader may fill the same one again.

        Raises:
            ConfigError: this is no teacher, or a recording.
            TeacherError: an open teacher is on another device or has other classes.
        """
        if teacher is not None and (not isinstance(teacher, AnyTeacher) or is_recording(teacher)):
            raise ConfigError(
                f"teacher: got {type(teacher).__qualname__}; pass a module, an open teacher or settings. A recording "
                "is of the images of a KDDataLoader, which replays it"
            )
        self._names, self._teacher, self._change = names, teacher, change
        self._classes, self._device, self._sync = classes, device, sync
        self._num_own_rows = num_own_rows
        self._clones = reads_ahead and device.type == "cpu"  # to a GPU they are copied anyway
        self.process = OwnProcess(lambda: [self._teacher])
        """That of the teacher's threads."""
        self.owns_teacher = teacher is not None and not isinstance(teacher, Teacher)
        """Whether the teacher is opened here."""
        self.first: KDBatch | None = None
        """At most two rows of the first batch, on the CPU."""
        self.num_first_rows = 0
        """Rows of the first batch."""
        if isinstance(teacher, Teacher):
            self._check(teacher)

    @property
    def teacher(self) -> Teacher | None:
        """The teacher, once it is open."""
        return self._teacher if isinstance(self._teacher, Teacher) else None

    @property
    def shard(self) -> Shard:
        """This process among those of the process group."""
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized():
            return Shard()
        return Shard(distributed.get_rank(), distributed.get_world_size())

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher, open or not."""
        return self._teacher is not None

    def prepare(self, raw: Any, row: int) -> tuple[KDBatch, Any]:
        """The batch of what the user's loader gave after `row` rows of the epoch, and its event.

        Raises:
            ConfigError, DataError: its fields are not what they are said to be.
            TeacherError: the teacher cannot be opened, or rejects the batch.
        """
        self._sync.wait_for(tensors_in(raw))
        with self._sync.on_teacher_stream(), torch.inference_mode(False):  # the next batch may be trained on
            batch = self._moved(raw, row)
            if self._change is not None:
                batch = self._changed(batch, self._change)
            if self._teacher is not None:
                batch = _with_outputs(batch, self._opened(batch))
            if self.first is None:
                self.num_first_rows = len(batch)
                self.first = _two_rows(batch)
            return batch, self._sync.record_event()

    def attach(self, teacher: Teacher) -> None:
        """Run `teacher`, which stays open, from the next batch on.

        Raises:
            TeacherError: it is on another device or has other classes.
        """
        self._check(teacher)
        self._teacher = teacher

    def completed(self, batch: KDBatch) -> tuple[KDBatch, Any]:
        """A batch that was prepared before the teacher was attached, with its outputs, and its event."""
        assert isinstance(self._teacher, Teacher)
        with self._sync.on_teacher_stream(), torch.inference_mode(False):
            batch = _with_outputs(batch, self._teacher)
            return batch, self._sync.record_event()

    def close(self) -> None:
        """Close the teacher if it was opened here, and not in the parent of this process."""
        if self.process.is_foreign:
            return
        if self.owns_teacher and isinstance(self._teacher, Teacher):
            self._teacher.close()

    def _moved(self, raw: Any, row: int) -> KDBatch:
        """The batch on the device."""
        to_device = self._to_device
        if isinstance(raw, KDBatch):
            return KDBatch(map_tensors(to_device, raw.asdict()))
        fields = read_fields(raw, self._names)
        rows, shard = len(fields), self.shard
        index, valid = fields.index, fields.valid
        position = torch.arange(row, row + rows, device=self._device)
        if index is None:
            index = position * shard.world_size + shard.rank
        if valid is None:
            valid = position < (row + rows if self._num_own_rows is None else self._num_own_rows)
        # Dtypes are changed there, where that is faster and less was copied.
        labels = None if fields.labels is None else to_device(fields.labels)
        if labels is not None:
            labels = labels.float() if labels.is_floating_point() else labels.long()
        return KDBatch(
            inputs={name: to_device(tensor).contiguous() for name, tensor in fields.inputs.items()},
            labels=labels,
            masks=None if fields.masks is None else to_device(fields.masks).long(),
            index=to_device(index).long(),
            valid=to_device(valid).bool(),
            extra={name: to_device(each) if isinstance(each, Tensor) else each for name, each in fields.extra.items()},
        )

    def _to_device(self, tensor: Tensor) -> Tensor:
        moved = self._sync.to_device(tensor)
        return moved.clone() if self._clones else moved

    def _changed(self, batch: KDBatch, change: Callable[[KDBatch], KDBatch]) -> KDBatch:
        changed = change(batch)
        if not isinstance(changed, KDBatch):
            raise ConfigError(f"prepare returns a KDBatch, got {type(changed).__qualname__}; return batch.replace(...)")
        rows = {name: len(tensor) for name, tensor in changed.items() if isinstance(tensor, Tensor)}
        if len({*rows.values()}) > 1:
            raise DataError(f"prepare returned fields with different numbers of rows: {rows}; change all of them")
        return changed

    def _opened(self, batch: KDBatch) -> Teacher:
        """The teacher, opened for the inputs of the first batch; the random state stays."""
        if isinstance(self._teacher, Teacher):
            return self._teacher
        module = self._teacher if isinstance(self._teacher, nn.Module) else None
        settings = TeacherSettings() if module is not None else self._teacher
        assert settings is not None and not isinstance(settings, nn.Module)
        view, *others = views_of(settings)
        if others:
            raise ConfigError(
                f"the teachers see the views {', '.join([view, *others])}, and are opened for batches of your own with "
                "one view; open each for its own (open_teacher) and pass kd_pipeline.teachers.group.TeacherGroup"
            )
        inputs = batch.of_view(view).inputs
        gpus = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):
            opened = open_teacher(
                settings,
                module=module,
                example=_contiguous(inputs),
                device=self._device,
                batch_size=len(next(iter(inputs.values()))),
            )
        try:
            self._teacher = match_classes(opened, self._classes)
        except BaseException:
            opened.close()
            raise
        self.process.use()
        return self._teacher

    def _check(self, teacher: Teacher) -> None:
        self.process.use()  # most runtimes have threads
        if teacher.device != self._device:
            raise TeacherError(
                f"the {teacher.backend} teacher reads from {teacher.device}, and the loader gives batches on "
                f"{self._device}; open both on the same device"
            )
        for name, classes in teacher.logits.items():
            if None not in (self._classes, classes) and classes != self._classes:
                raise TeacherError(
                    f"the teacher's classes ({name}) are not those of the loader in the same order; give the loader "
                    "the teacher's names as classes, or its settings as teacher, whose logits are matched by name"
                )


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as one dense buffer each, which teachers read."""
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _with_outputs(batch: KDBatch, teacher: Teacher) -> KDBatch:
    found = teacher.with_outputs(batch.replace(inputs=_contiguous(batch.inputs), views=_contiguous(batch.views)))
    return batch.replace(teacher=found.teacher, teacher_views=found.teacher_views)


def _two_rows(batch: KDBatch) -> KDBatch:
    """Copies of the first two rows on the CPU; of a single row, the same one twice."""
    rows = [0, min(1, len(batch) - 1)]

    def pick(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: pick(each) for name, each in value.items()}
        return value[rows].cpu() if isinstance(value, Tensor) and value.ndim and len(value) == len(batch) else value

    return KDBatch(pick(batch.asdict()))
