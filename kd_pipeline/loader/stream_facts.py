"""What a stream of batches depends on, as plain values: two streams with the same facts have the same batches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.optional import require
from kd_pipeline.batch import KDBatch
from kd_pipeline.data.graph_settings import GraphSettings
from kd_pipeline.data.plan import LastBatch, Plan
from kd_pipeline.data.settings import LoaderSettings
from kd_pipeline.data.transforms import EvalTransform, TrainTransform, plain_fields
from kd_pipeline.data.views import fields_of_view, view_fields
from kd_pipeline.errors import ConfigError
from kd_pipeline.loader.stream_data import StreamData
from kd_pipeline.loader.verify_recording import cut_of_mixed_batch, require_fixed_sizes
from kd_pipeline.teachers.base import Teacher
from kd_pipeline.teachers.recorded.recording import Recording

__all__ = ["StreamFacts", "transform_fields"]


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """All that does not change in the life of a loader; its plan and its teacher may."""

    data: StreamData
    settings: LoaderSettings
    graph_settings: GraphSettings
    device: torch.device
    shuffle_fields: Mapping[str, Any]
    last_batch: LastBatch | None
    """As it was set; None for the default."""
    prepare: Callable[[KDBatch], KDBatch] | None

    def of_batches(
        self, plan: Plan, teacher: Teacher | Recording | None, teacher_views: tuple[str, ...]
    ) -> dict[str, Any]:
        """Everything that the stream of batches depends on; not threads, `prefetch` and `ahead`.

        Fields of later releases are None if unused, as in the state of an older release, which lacks them.
        """
        data = self.data
        depends_on_decoder = self.device.type == "cuda" and data.source.stores != "pixels"
        return {
            "source": data.source.fingerprint,
            "num_samples": len(data.source),
            "transform": transform_fields(data.transform),
            "views": self._fields_of_views(teacher_views) or None,
            "mix": None if data.mix is None else data.mix.model_dump(mode="json"),
            "teacher": None if teacher is None else teacher.fingerprint,
            "teacher_views": None if teacher_views == (IMAGES,) else list(teacher_views),
            "seed": plan.seed,
            **self.shuffle_fields,
            "global_batch_size": plan.global_batch_size,
            # Not the plan's: the default pads on several ranks, with the same samples as `keep` has on one.
            "last_batch": self.last_batch or "keep",
            "repeats": plan.repeats if plan.repeats > 1 else None,
            "prepare": None
            if self.prepare is None
            else getattr(self.prepare, "__qualname__", type(self.prepare).__name__),
            "on_bad_sample": self.settings.on_bad_sample,
            "max_pixels": self.settings.max_pixels,
            "device": self.device.type,
            # Both modes give the same pixels on a CPU; a GPU's decoder may round windows and whole images differently.
            "decode": self.graph_settings.decode if depends_on_decoder else None,
            "hw_decoder_load": self.graph_settings.hw_decoder_load or None,
            "dali": require("nvidia.dali", extra="cpu").__version__,
        }

    def of_teachers_images(
        self, plan: Plan, teacher: Teacher | Recording | None, teacher_views: tuple[str, ...]
    ) -> dict[str, Any]:
        """Everything that the image at a position of an epoch depends on, of the view that the teacher sees.

        Raises:
            ConfigError: the teacher sees several views, or images whose size depends on the batch size.
        """
        if len(teacher_views) > 1:
            raise ConfigError(
                f"a recording has the outputs for one view, and the members of the teacher see "
                f"{' and '.join(teacher_views)}; give them one view to record them"
            )
        (view,), data = teacher_views, self.data
        require_fixed_sizes(data.all_views, view, data.mix)
        if (count := data.all_views[view].count) is not None:
            raise ConfigError(
                f"a recording has outputs for one image of each sample, and the teacher's view {view} has "
                f"{count} copies; give it a view without count to record it"
            )
        fields = self.of_batches(plan, teacher, teacher_views)
        for name in ("teacher", "teacher_views", "views", "global_batch_size", "last_batch"):
            del fields[name]
        return {
            **fields,
            "view": fields_of_view(data.transform, data.view_settings, view),
            "cut_of_mixed_batch": cut_of_mixed_batch(plan, data.mix),
        }

    def _fields_of_views(self, teacher_views: tuple[str, ...]) -> dict[str, Any]:
        """What the views of the batches and of the teacher depend on; a recording's need not be in the batches."""
        data = self.data
        names = data.all_views.only({*data.views.names, *teacher_views}).names
        fields = view_fields(data.transform, data.view_settings)
        return {name: fields[name] for name in names if name in fields}


def transform_fields(transform: TrainTransform | EvalTransform) -> dict[str, Any]:
    """What the images depend on, as plain values; fields of later releases are None if unused."""
    fields = plain_fields(transform)
    return fields | {"orientation": None if transform.orientation == "upright" else transform.orientation}
