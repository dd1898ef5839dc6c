"""What a loader says about its data: samples, classes, masks, and the views of each sample."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from kd_pipeline._core.constants import IGNORE_INDEX, IMAGES
from kd_pipeline.data.sources import Source, masks_of
from kd_pipeline.data.views import Views, ViewSettings
from kd_pipeline.errors import ConfigError
from kd_pipeline.models.input_adapter import Normalization
from kd_pipeline.models.modules import zero_images

if TYPE_CHECKING:
    from kd_pipeline.data.mixing import MixSettings
    from kd_pipeline.data.transforms import EvalTransform, TrainTransform

__all__ = ["StreamData"]


class StreamData:
    """A source, and what is done to its samples."""

    def __init__(
        self,
        source: Source,
        transform: "TrainTransform | EvalTransform",
        *,
        views: Mapping[str, ViewSettings] | None,
        shown_views: Collection[str] | None,
        mix: "MixSettings | None",
        plugins: Collection[str],
    ) -> None:
        """Describe `source`; `KDDataLoader` describes the arguments.

        Raises:
            ConfigError: there is no such view.
        """
        self.source, self.transform, self.mix = source, transform, mix
        self._view_settings, self._known_views = dict(views or {}), Views.of(transform, views).opened(plugins)
        self.views = self._known_views if shown_views is None else self._known_views.only(shown_views)
        """How the views of a sample are made; `transform` describes the first."""
        self.classes = source.classes
        """Class names in label order; None if the source has none."""

    @property
    def num_classes(self) -> int | None:
        """That of the source; None if it has no classes."""
        return self.source.num_classes

    @property
    def has_labels(self) -> bool:
        """Whether batches have labels."""
        return self.source.labels is not None

    @property
    def has_masks(self) -> bool:
        """Whether batches have masks."""
        return masks_of(self.source) is not None

    @property
    def ignore_index(self) -> int:
        """Class in masks of the pixels that have none."""
        masks = masks_of(self.source)
        return IGNORE_INDEX if masks is None else masks.ignore_index

    @property
    def labels_are_soft(self) -> bool:
        """Whether labels are weights `[N, K]`, as those of mixed images are."""
        return self.mix is not None

    def sample_name(self, index: int) -> str:
        """The name in messages of the sample at `index` of the dataset."""
        return self.source.name(index)

    @property
    def all_views(self) -> Views:
        """How all views are made that are known, whether batches have them or not."""
        return self._known_views

    @property
    def view_settings(self) -> Mapping[str, ViewSettings]:
        """The settings of all known views besides `images`."""
        return self._view_settings

    def example(self, view: str = IMAGES) -> dict[str, Tensor]:
        """Inputs of two rows by name, for a trial run of a network: a view of zeros in float32, on the CPU."""
        return zero_images(self._known_views[view].image_shape)

    def normalization(self, view: str = IMAGES) -> Normalization:
        """How a view is normalized."""
        normalize = self._known_views[view].normalize
        return Normalization(normalize.mean, normalize.std)

    @property
    def fingerprint(self) -> str:
        """Hex digest of the content of the data, that of the source."""
        return self.source.fingerprint

    def _check_mix(self, batch_size: int, repeats: int) -> None:
        """Refuse what cannot be mixed.

        Raises:
            ConfigError: partners would be in different batches, or there are masks.
        """
        if self.mix is None:
            return
        if batch_size % (2 * repeats):
            raise ConfigError(
                f"batch_size must be a multiple of {2 * repeats} when images are mixed and repeats is {repeats}, to "
                f"keep partners in one batch, got {batch_size}"
            )
        if self.has_masks:
            raise ConfigError("mix blends images, and the masks of these have one class for each pixel; leave out mix")
