"""One batch on its way from DALI through mixing and the teacher to the consumer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kd_pipeline.batch import KDBatch
from kd_pipeline.data.mixing import MixSettings, mix_images, mix_labels
from kd_pipeline.data.reader import INDEX, LABEL, MIXING, VALID, ReadBatch, Reader, ReadGroup
from kd_pipeline.data.sources import Source
from kd_pipeline.data.uniform import counted, is_uniform
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.streams import StreamSync
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording

__all__ = ["PendingBatch", "Preparation"]


@dataclass(frozen=True, slots=True)
class PendingBatch:
    """A batch whose teacher outputs are complete, or on a GPU will be at its event."""

    batch: KDBatch
    buffer: object
    """DALI's handle of the images."""
    torch_owned: list[Tensor]
    """The tensors whose memory torch allocated: all but the images, and these too if mixed."""
    event: Any
    counted: Tensor
    """`[2, N]` bool, for the counter of images that had a single color before they were mixed."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is done to every batch that DALI returns."""

    source: Source
    size: tuple[int, int]
    """Height and width of the images."""
    mix: MixSettings | None
    teacher: Teacher | Recording | None
    device: torch.device
    sync: StreamSync
    change: Callable[[KDBatch], KDBatch] | None = None
    """The user's function, which changes a batch before the teacher sees it."""
    _groups: WeakKeyDictionary[ReadGroup, list[tuple[Tensor, ...]]] = field(default_factory=WeakKeyDictionary)
    """What `_split` returned for the groups of which batches are to come."""

    def prepare(self, reader: Reader, epoch: int, number: int) -> PendingBatch:
        """Take a batch from DALI and start the teacher on it."""
        read = reader.read(epoch, number, self.sync.stream)
        with self.sync.on_teacher_stream():
            batches = self._groups.get(read.group)
            if batches is None:
                batches = self._groups[read.group] = self._split(read.group)
            images, metadata, index, valid, counted = batches[read.place]
            labels = None if self.source.labels is None else metadata[LABEL]
            if self.mix is not None:
                images, labels = self._mixed(self.mix, images, labels, metadata[MIXING].T)
            batch = KDBatch(images=images, labels=labels, index=index, valid=valid)
            if self.change is not None:
                batch = self._changed(self.change, batch)
            batch = batch.replace(teacher=self._teacher_outputs(batch.input, read, epoch))
            tensors = [batch.labels, batch.index, batch.valid, counted, *batch.inputs.values(), *batch.teacher.values()]
            # The images are DALI's own, unless something made new ones.
            owned = [each for each in tensors if each is not None and (self.mix is not None or each is not images)]
            return PendingBatch(batch, read.images, owned, self.sync.record_event(), counted)

    def _changed(self, change: Callable[[KDBatch], KDBatch], batch: KDBatch) -> KDBatch:
        changed: object = change(batch)
        if not isinstance(changed, KDBatch):
            raise ConfigError(
                f"prepare returned an object of type {type(changed).__name__}; return a KDBatch, such as "
                "batch.replace(images=...)"
            )
        for name, tensor in changed.items():
            if isinstance(tensor, Tensor) and tensor.shape[:1] != (len(batch),):
                raise ConfigError(
                    f"prepare returned {name} {list(tensor.shape)} for a batch of {len(batch)}; keep the rows, and "
                    "mark those to leave out as not valid"
                )
        return changed

    @torch.inference_mode(False)  # the next batch may be trained on
    def _split(self, group: ReadGroup) -> list[tuple[Tensor, ...]]:
        """Images, metadata, index, valid and `counted` of each batch of a group, as parts of the group's tensors.

        What is done to all batches at once takes as long as for one of them.
        """
        images, metadata = self.sync.as_tensor(group.images), self.sync.to_device(group.planned.metadata)
        valid = metadata[VALID].bool()
        of_images = counted(is_uniform(images), valid)
        sizes = [end - start for start, end in pairwise(group.planned.ends)]
        parts = (
            images.split_with_sizes(sizes),
            metadata.split_with_sizes(sizes, 1),
            metadata[INDEX].split_with_sizes(sizes),
            valid.split_with_sizes(sizes),
            of_images.split_with_sizes(sizes, 1),
        )
        return list(zip(*parts, strict=True))

    def _mixed(
        self, mix: MixSettings, images: Tensor, labels: Tensor | None, columns: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Mixed images in a new tensor, and labels as weights `[N, K]`."""
        num_classes = self.source.num_classes
        if labels is not None and num_classes is not None:
            smoothing = mix.label_smoothing
            labels = mix_labels(labels, columns, num_classes=num_classes, label_smoothing=smoothing, size=self.size)
        return mix_images(images, columns), labels

    def _teacher_outputs(
        self, inputs: Tensor | Mapping[str, Tensor], read: ReadBatch, epoch: int
    ) -> Mapping[str, Tensor]:
        match self.teacher:
            case None:
                return {}
            case Recording() as recording:
                return recording.replay(epoch, read.plan.position, read.metadata[INDEX], device=self.device)
            case teacher:
                return teacher(inputs)
