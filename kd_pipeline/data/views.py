"""Views: the images that are made of each sample from one decoding of it, and the random numbers of each."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Discriminator, Field, Tag

from kd_pipeline._core.channels import ChannelMeans, ChannelStds
from kd_pipeline._core.constants import IMAGES
from kd_pipeline._core.image_size import Size, height_width
from kd_pipeline._core.settings import Settings
from kd_pipeline._core.suggestions import suggest
from kd_pipeline._core.text import printable
from kd_pipeline.data.affine import RandomAffine
from kd_pipeline.data.auto_augment import Array, AutoAugment
from kd_pipeline.data.ops import (
    CenterCrop,
    ColorJitter,
    GaussianBlur,
    Normalize,
    PixelOp,
    RandomErasing,
    RandomResizedCrop,
    with_own_color,
    with_own_erasing,
)
from kd_pipeline.data.own_ops import FactoryOp
from kd_pipeline.data.plan import uniforms
from kd_pipeline.data.size_schedule import ProgressiveSize, RandomSize
from kd_pipeline.data.transforms import EvalTransform, TrainTransform, plain_fields
from kd_pipeline.errors import ConfigError

__all__ = [
    "Draws",
    "EvalView",
    "FollowingView",
    "Sizes",
    "TrainView",
    "View",
    "ViewSettings",
    "Views",
    "fields_of_view",
    "view_fields",
]

Sharing = Literal["shared", "own", "none"]
_FORMAT = ("interpolation", "mean", "std", "dtype", "orientation")
"""What a view takes from `transform` unless it says otherwise."""


class FollowingView(Settings):
    """The windows of another view at another size, with its flips and all that moves pixels."""

    follow: str
    """The view that it follows: `images`, or one with a transform of its own."""
    size: Size
    """Height and width of the finished image, in pixels. Another aspect ratio stretches the window. It stays the same
    where the size of the other view changes."""
    color: Sharing = "shared"
    """Color jitter, grayscale, blur, and the ops of `auto_augment` that change colors: `shared` is what the other view
    drew, `own` other numbers from the same ranges, and `none` leaves them out."""
    erase: Sharing = "shared"
    """The same of the rectangle that is erased."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Filter of the resize; defaults to that of the other view."""
    mean: ChannelMeans | None = None
    """Subtracted from red, green and blue; defaults to that of the other view."""
    std: ChannelStds | None = None
    """Divides red, green and blue after that; defaults to that of the other view."""
    dtype: Literal["float32", "float16"] | None = None
    """Type of the finished images; defaults to that of the other view."""


class TrainView(TrainTransform):
    """Windows of its own. Interpolation, mean, std, dtype and orientation default to those of `transform`."""

    count: int | None = Field(default=None, ge=1, le=64)
    """Windows of each image, which makes the view `[N, count, 3, H, W]`; defaults to one, as `[N, 3, H, W]`."""


class EvalView(EvalTransform):
    """The center of the image. Interpolation, mean, std, dtype and orientation default to those of `transform`."""


def _kind_of(value: Any) -> str | None:
    if isinstance(value, Mapping):
        return "follow" if "follow" in value else value.get("preset")
    return "follow" if isinstance(value, FollowingView) else getattr(value, "preset", None)


ViewSettings = Annotated[
    Annotated[FollowingView, Tag("follow")] | Annotated[TrainView, Tag("train")] | Annotated[EvalView, Tag("eval")],
    Discriminator(
        _kind_of,
        custom_error_type="view_kind",
        custom_error_message="a view needs `follow`, the name of another view, or `preset`, which is train or eval",
    ),
]
"""What a config may have for each view under `views`."""


@dataclass(frozen=True)
class View:
    """One view of every sample, as a graph makes it."""

    name: str
    crop: RandomResizedCrop | CenterCrop
    ops: tuple[PixelOp, ...]
    """After the crop."""
    num_draws: int
    """Uniform numbers that each copy needs, without those of `keyed`, which come after all others."""
    count: int | None = None
    """Copies of it, each with a window of its own; None for one, without a dimension."""
    leader: str | None = None
    """The view whose windows and draws it has; None for a view with its own."""
    color: Sharing = "shared"
    erase: Sharing = "shared"
    settings: TrainTransform | EvalTransform | FollowingView | None = None
    """What it is made of."""
    schedule: RandomSize | ProgressiveSize | None = None
    """How its size changes, which `crop` has the largest of; None if it does not. A view that follows has one size."""

    @property
    def own_ops(self) -> list[FactoryOp]:
        """Those of the user's own."""
        return [op for op in self.ops if isinstance(op, FactoryOp)]

    @property
    def keyed(self) -> list[RandomResizedCrop | RandomAffine | FactoryOp]:
        """What has random numbers of its own, in the order of their columns."""
        crop = [self.crop] if isinstance(self.crop, RandomResizedCrop) and self.crop.num_columns else []
        return [*crop, *(op for op in self.ops if isinstance(op, RandomAffine)), *self.own_ops]

    @property
    def copies(self) -> int:
        """How many images it has of each sample."""
        return self.count or 1

    @property
    def normalize(self) -> Normalize:
        """The last op, which determines the format."""
        last = self.ops[-1]
        assert isinstance(last, Normalize)
        return last

    @property
    def height_width(self) -> tuple[int, int]:
        """Height and width of an image, in pixels; the largest if they change."""
        return self.crop.size

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """All heights and widths that can come, the largest first."""
        return [self.crop.size] if self.schedule is None else self.schedule.sizes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(3, H, W)`; the largest if they change."""
        return (3, *self.crop.size)

    @property
    def input_shape(self) -> tuple[int, int | None, int | None]:
        """`(3, H, W)`, where None is a size that changes."""
        return self.image_shape if self.schedule is None else (3, None, None)

    def parameters(self, draws: Array) -> Iterator[NDArray[Any]]:
        """Parameters of all ops of a copy, `[N, ...]` each, from its uniform numbers `[N, num_draws]`.

        The last are heights and widths, if they change.
        """
        for op in self.ops:
            for array in op.parameters(draws):
                # DALI has no use for double precision.
                dtype = np.float32 if array.dtype == np.float64 else array.dtype
                yield np.ascontiguousarray(array, dtype=dtype)
        if self.schedule is not None:
            yield np.tile(np.array(self.crop.size, np.float32), (len(draws), 1))

    @property
    def ndims(self) -> list[int]:
        """Dimensions per sample of each array of `parameters`."""
        ops = [ndim for op in self.ops for ndim in op.ndims]
        return ops if self.schedule is None else [*ops, 1]

    def of_batch(self, parameters: Sequence[NDArray[Any]]) -> "View":
        """The view at the size of a batch, which `parameters` of its first copy and perhaps more are of."""
        if self.schedule is None:
            return self
        height, width = parameters[len(self.ndims) - 1][0].astype(int).tolist()
        return _at_size(self, (height, width))


Draws = Mapping[str, Sequence[Array]]
"""Uniform numbers `[N, ...]` of each copy, by the name of the view."""
Sizes = tuple[tuple[int, int], ...]
"""Height and width of each view whose size changes."""


@dataclass(frozen=True)
class Views:
    """All views of a loader; `images` is the first. Leaders come before the views that follow them."""

    views: tuple[View, ...]
    _sized: dict["Sizes", "Views"] = field(init=False, compare=False, repr=False, default_factory=dict)

    @classmethod
    def of(
        cls,
        transform: TrainTransform | EvalTransform,
        settings: Mapping[str, FollowingView | TrainView | EvalView] | None = None,
    ) -> "Views":
        """The views of a split.

        Raises:
            ConfigError: a name is taken, or a view follows none that exists.
        """
        found, settings = {IMAGES: _own(IMAGES, transform)}, settings or {}
        for name, view in settings.items():
            if name == IMAGES or not name or printable(name) != name:
                raise ConfigError(f"views: {name!r} cannot be the name of a view; {IMAGES} is that of the transform")
            if not isinstance(view, FollowingView):
                found[name] = _own(name, _with_format_of(transform, view, name), getattr(view, "count", None))
        for name, view in settings.items():
            if isinstance(view, FollowingView):
                found[name] = _following(name, view, _leader(name, view, found))
        return cls(tuple(found.values()))

    def opened(self, plugins: Collection[str]) -> "Views":
        """The same with the functions of the user's own ops.

        Raises:
            ConfigError: one is not in a module among `plugins`, or is no function there.
        """
        views = []
        for view in self.views:
            leader = view.leader or view.name
            key = "transform.order" if leader == IMAGES else f"views.{leader}.order"
            ops = tuple(op.opened(key, plugins) if isinstance(op, FactoryOp) else op for op in view.ops)
            views.append(replace(view, ops=ops))
        return Views(tuple(views))

    def depend_on_batch(self, name: str) -> bool:
        """Whether the pixels of a view depend on the batch that a sample is in, but for mixing."""
        view = self[name]
        schedule = self[view.leader or name].schedule
        if schedule is None or not schedule.changes_in_epoch:
            return False
        # Lengths in pixels of a view that follows are in proportion to its own size and that of the other.
        return view.leader is None or any(isinstance(op, AutoAugment | GaussianBlur | RandomAffine) for op in view.ops)

    def sizes(self, number: NDArray[np.int64], *, seed: int, epoch: int) -> list[Sizes]:
        """Those of the batches `number` `[n]` of an epoch: the same on every rank."""
        changing = [
            view.schedule.at(view.name, seed=seed, epoch=epoch, number=number)
            for view in self.views
            if view.schedule is not None
        ]
        return list(zip(*changing, strict=True)) if changing else [()] * len(number)

    def at(self, sizes: Sizes) -> "Views":
        """The same at the sizes of a batch."""
        if not sizes:
            return self
        if sizes not in self._sized:
            remaining = iter(sizes)
            found: dict[str, View] = {}
            for view in self.views:
                if isinstance(view.settings, FollowingView):
                    found[view.name] = _following(view.name, view.settings, found[view.settings.follow])
                else:
                    found[view.name] = view if view.schedule is None else _at_size(view, next(remaining))
            self._sized[sizes] = Views(tuple(found.values()))
        return self._sized[sizes]

    def __iter__(self) -> Iterator[View]:
        return iter(self.views)

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, name: str) -> View:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    @property
    def names(self) -> list[str]:
        """Those of all views."""
        return [view.name for view in self.views]

    @property
    def images(self) -> View:
        """The view that `transform` describes."""
        return self.views[0]

    @cached_property
    def _by_name(self) -> dict[str, View]:
        return {view.name: view for view in self.views}

    @cached_property
    def leaders(self) -> tuple[View, ...]:
        """The views with windows of their own."""
        return tuple(view for view in self.views if view.leader is None)

    @property
    def windows(self) -> list[tuple[View, int]]:
        """Each window that is cut from an image: its view, and which copy of it."""
        return [(view, copy) for view in self.leaders for copy in range(view.copies)]

    def only(self, names: Collection[str]) -> "Views":
        """`images` and the views called `names`, with those that they follow."""
        leaders = {self[name].leader for name in names}
        return Views(tuple(view for view in self.views if view.name in {IMAGES, *names, *leaders}))

    def draw(
        self,
        index: NDArray[np.int64],
        *,
        seed: int,
        epoch: int,
        repeat: NDArray[np.int64] | Literal[0] = 0,
        at_least: int = 0,
    ) -> Draws:
        """Uniform numbers of all views of the samples `index` `[N]`, whatever the batch and rank.

        Args:
            index: positions in the dataset.
            seed: of the plan.
            epoch: counted from 0.
            repeat: see `BatchPlan`.
            at_least: numbers that mixing needs of `images`.
        """

        def own(view: View, count: int) -> list[Array]:
            keys = [(None if view is self.images else view.name, count)]
            # No view is called so, because names are printable.
            keys += [(f"{view.name}\n{op.key}", op.num_columns) for op in view.keyed]
            drawn = [
                [
                    uniforms(index, seed=seed, epoch=epoch, count=number, repeat=repeat, view=key, copy=copy)
                    for key, number in keys
                ]
                for copy in range(view.copies)
            ]
            return [np.concatenate(parts, axis=1, dtype=np.float64) for parts in drawn]

        draws: dict[str, Sequence[Array]] = {}
        for view in self.views:
            if view.leader is None:
                draws[view.name] = own(view, max(view.num_draws, at_least if view is self.images else 0))
            elif view.color == view.erase == "shared":
                draws[view.name] = draws[view.leader]
            else:
                pairs = zip(draws[view.leader], own(view, view.num_draws), strict=True)
                draws[view.name] = [_merged(view, self[view.leader], *pair) for pair in pairs]
        return draws

    def crops(self, draws: Draws) -> tuple[tuple[Array, ...], ...]:
        """Parameters of the crop of each of `windows`, `[N, ...]` each."""
        return tuple(view.crop.parameters(draws[view.name][copy]) for view, copy in self.windows)

    def parameters(self, draws: Draws) -> tuple[NDArray[Any], ...]:
        """Parameters of all that follows the crops, view by view and copy by copy, `[N, ...]` each."""
        return tuple(array for view in self.views for numbers in draws[view.name] for array in view.parameters(numbers))


def view_fields(
    transform: TrainTransform | EvalTransform, settings: Mapping[str, FollowingView | TrainView | EvalView]
) -> dict[str, Any]:
    """What the views in `settings` depend on besides `transform`, as plain values."""
    return {
        name: plain_fields(view if isinstance(view, FollowingView) else _with_format_of(transform, view, name))
        for name, view in settings.items()
    }


def fields_of_view(
    transform: TrainTransform | EvalTransform,
    settings: Mapping[str, FollowingView | TrainView | EvalView],
    name: str,
) -> dict[str, Any] | None:
    """What the view called `name` depends on besides `transform`, as plain values; None for `images`."""
    if name == IMAGES:
        return None
    fields = view_fields(transform, settings)
    followed = fields.get(fields[name].get("follow"), {})
    return {"name": name, **fields[name], **{f"followed.{key}": value for key, value in followed.items()}}


def _own(name: str, transform: TrainTransform | EvalTransform, count: int | None = None) -> View:
    crop, ops, num_draws = transform.crop, transform.ops, transform.num_draws
    return View(name, crop, ops, num_draws, count, settings=transform, schedule=transform.schedule)


def _at_size(view: View, size: tuple[int, int]) -> View:
    """A view with windows of its own whose size changes, at one of its sizes."""
    assert isinstance(view.settings, TrainTransform)
    own = _own(view.name, view.settings.at_size(size), view.count)
    return replace(own, settings=view.settings, schedule=view.schedule)


def _with_format_of(
    transform: TrainTransform | EvalTransform, view: TrainView | EvalView, name: str
) -> TrainView | EvalView:
    """`view` with the format of `transform`, where it has not said another."""
    if "orientation" in view.model_fields_set and view.orientation != transform.orientation:
        raise ConfigError(
            f"views.{name}.orientation is {view.orientation} and that of transform {transform.orientation}, but each "
            "image is decoded once; leave it out"
        )
    inherited = {key: getattr(transform, key) for key in _FORMAT if key not in view.model_fields_set}
    if isinstance(view, EvalView) and inherited.get("interpolation") == "random":
        del inherited["interpolation"]  # evaluation is not random
    return view.model_copy(update=inherited)


def _leader(name: str, settings: FollowingView, found: Mapping[str, View]) -> View:
    leader = found.get(settings.follow)
    if leader is None or leader.leader is not None:
        leaders = [view.name for view in found.values() if view.leader is None]
        raise ConfigError(
            f"views.{name}.follow is {settings.follow!r}, and a view follows {IMAGES} or one with a preset"
            f"{suggest(settings.follow, leaders)}; these are {', '.join(leaders)}"
        )
    return leader


def _following(name: str, settings: FollowingView, leader: View) -> View:
    size = height_width(settings.size)
    scale = size[0] / leader.height_width[0], size[1] / leader.height_width[1]
    normalize = replace(
        leader.normalize,
        **{key: value for key in ("mean", "std", "dtype") if (value := getattr(settings, key)) is not None},
    )
    ops: list[PixelOp] = []
    for op in leader.ops[:-1]:
        match op:
            case AutoAugment() | RandomAffine():
                ops.append(op.at_scale(scale))
            case ColorJitter() | GaussianBlur() if settings.color == "none":
                pass
            case FactoryOp() if settings.color == "none" and op.settings.changes == "colors":
                pass
            case GaussianBlur():
                ops.append(op.at_scale(scale))
            case RandomErasing():
                if settings.erase != "none":
                    ops.append(replace(op, size=size, mean=normalize.mean))
            case _:
                ops.append(op)
    crop = replace(leader.crop, size=size, interpolation=settings.interpolation or leader.crop.interpolation)
    return View(
        name=name,
        crop=crop,
        ops=(*ops, normalize),
        num_draws=leader.num_draws,
        count=leader.count,
        leader=leader.name,
        color=settings.color,
        erase=settings.erase,
        settings=settings,
    )


def _merged(view: View, leader: View, shared: Array, own: Array) -> Array:
    """The numbers of the view that it follows, with those of its own for what it does not share."""
    num_of_ops = sum(op.num_columns for op in leader.keyed)
    numbers, of_ops = shared[:, : view.num_draws].copy(), shared[:, shared.shape[1] - num_of_ops :].copy()
    own, own_of_ops = own[:, : view.num_draws], own[:, view.num_draws :]
    if view.color == "own":
        numbers = with_own_color(numbers, own)
    if view.erase == "own":
        numbers = with_own_erasing(numbers, own)
    for op in view.ops:
        if isinstance(op, AutoAugment) and view.color != "shared":
            numbers = op.with_own_colors(numbers, own if view.color == "own" else None)
        if isinstance(op, FactoryOp) and view.color == "own" and op.settings.changes == "colors":
            of_ops[:, op.columns] = own_of_ops[:, op.columns]
    return np.concatenate([numbers, of_ops], axis=1)
