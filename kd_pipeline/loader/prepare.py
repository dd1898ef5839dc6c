"""One batch on its way from DALI through mixing and the teacher to the consumer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kd_pipeline._core.constants import IMAGES
from kd_pipeline.batch import KDBatch
from kd_pipeline.data.mixing import MixSettings, at_size, mix_images, mix_labels
from kd_pipeline.data.reader import INDEX, LABEL, MIXING, VALID, ReadBatch, Reader, ReadGroup
from kd_pipeline.data.sources import Source
from kd_pipeline.data.uniform import counted, is_uniform
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.streams import StreamSync
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording

__all__ = ["PendingBatch", "Preparation"]


_Parts = tuple[dict[str, Tensor], Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""Views by name, metadata, index, valid, `counted` and masks, in small integers, of a batch."""


@dataclass(frozen=True, slots=True)
class PendingBatch:
    """A batch whose teacher outputs are complete, or on a GPU will be at its event."""

    batch: KDBatch
    buffer: object
    """DALI's handles of the views."""
    torch_owned: list[Tensor]
    """The tensors whose memory torch allocated: all but the views, and these too if mixed."""
    event: Any
    counted: Tensor
    """`[2, N]` bool, for the counter of images that had a single color before they were mixed."""


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is done to every batch that DALI returns."""

    source: Source
    mix: MixSettings | None
    teacher: Teacher | Recording | None
    recorded_view: str
    """The view that a recording is of."""
    device: torch.device
    sync: StreamSync
    change: Callable[[KDBatch], KDBatch] | None = None
    """The user's function, which changes a batch before the teacher sees it."""
    _groups: WeakKeyDictionary[ReadGroup, list[_Parts]] = field(default_factory=WeakKeyDictionary)
    """What `_split` returned for the groups of which batches are to come."""

    def prepare(self, reader: Reader, epoch: int, number: int) -> PendingBatch:
        """Take a batch from DALI and start the teacher on it."""
        read = reader.read(epoch, number, self.sync.stream)
        with self.sync.on_teacher_stream(), torch.inference_mode(False):  # the next batch may be trained on
            batches = self._groups.get(read.group)
            if batches is None:
                batches = self._groups[read.group] = self._split(read.group)
            made, metadata, index, valid, counted, small = batches[read.place]
            views, labels = dict(made), None if self.source.labels is None else metadata[LABEL]
            if self.mix is not None:
                views, labels = self._mixed(self.mix, views, labels, metadata[MIXING].T)
            images, masks = views.pop(IMAGES), None
            if small is not None:
                masks = small.long()  # not of a whole group, as they take eight bytes for each pixel then
            batch = KDBatch(images=images, labels=labels, index=index, valid=valid, masks=masks, views=views)
            if self.change is not None:
                batch = self._changed(self.change, batch)
            batch = self._with_outputs(batch, read, epoch)
            # The views are DALI's own, unless something made new ones.
            of_dali = {id(view) for view in made.values()}
            owned = [each for each in (*batch.tensors(), counted) if id(each) not in of_dali]
            return PendingBatch(batch, read.group.views, owned, self.sync.record_event(), counted)

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

    def _split(self, group: ReadGroup) -> list[_Parts]:
        """Views, metadata, index, valid, `counted` and masks of each batch of a group, as parts of the group's tensors.

        What is done to all batches at once takes as long as for one of them.
        """
        views = {name: self.sync.as_tensor(view) for name, view in group.views.items()}
        metadata = self.sync.to_device(torch.from_numpy(group.planned.metadata))
        valid = metadata[VALID].bool()
        of_images = counted(is_uniform(views[IMAGES]), valid)
        sizes = [end - start for start, end in pairwise(group.planned.ends)]
        split = zip(*(view.split_with_sizes(sizes) for view in views.values()), strict=True)
        masks = None if group.masks is None else self.sync.to_device(torch.from_numpy(group.masks))
        parts = (
            [dict(zip(views, batch, strict=True)) for batch in split],
            metadata.split_with_sizes(sizes, 1),
            metadata[INDEX].split_with_sizes(sizes),
            valid.split_with_sizes(sizes),
            of_images.split_with_sizes(sizes, 1),
            [None] * len(sizes) if masks is None else masks.split_with_sizes(sizes),
        )
        return list(zip(*parts, strict=True))

    def _mixed(
        self, mix: MixSettings, views: Mapping[str, Tensor], labels: Tensor | None, columns: Tensor
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Mixed views in new tensors, all with the same partners, and labels as weights `[N, K]`."""
        num_classes, size = self.source.num_classes, _height_width(views[IMAGES])
        if labels is not None and num_classes is not None:
            smoothing = mix.label_smoothing
            labels = mix_labels(labels, columns, num_classes=num_classes, label_smoothing=smoothing, size=size)
        mixed = {}
        for name, view in views.items():
            images = view.flatten(1, -3)  # the copies as channels
            plan = at_size(columns, size, _height_width(view))
            mixed[name] = mix_images(images, plan).view(view.shape)
        return mixed, labels

    def _with_outputs(self, batch: KDBatch, read: ReadBatch, epoch: int) -> KDBatch:
        match self.teacher:
            case None:
                return batch
            case Recording() as recording:
                outputs = recording.replay(epoch, read.plan.position, read.metadata[INDEX], device=self.device)
                views = {} if self.recorded_view == IMAGES else dict.fromkeys(outputs, self.recorded_view)
                return batch.replace(teacher=outputs, teacher_views=views)
            case teacher:
                return teacher.with_outputs(batch)


def _height_width(images: Tensor) -> tuple[int, int]:
    """Those of `images` `[..., H, W]`."""
    return images.shape[-2], images.shape[-1]
