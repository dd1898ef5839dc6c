"""The batch that a loader yields."""

from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from kd_pipeline._core.constants import IMAGES

__all__ = ["KDBatch", "copies_as_rows", "map_tensors", "rows_name"]

_MAPPINGS = ("views", "teacher", "teacher_views", "extra")
_OWN_FIELDS = ("labels", "index", "valid", "masks", *_MAPPINGS)
"""All but the inputs."""


@dataclass(slots=True, init=False, eq=False, repr=False)
class KDBatch(Mapping[str, Any]):
    """One batch; row i of every field belongs to the same sample.

    It is also a mapping: `batch["images"]`, `"labels" in batch` and `dict(batch)` find the inputs by name, and the
    fields that are there. `len(batch)` is the number of rows, as of a tensor.

    `images` is the buffer that a teacher of these images read, and each of `views` that of a teacher of this view:
    DALI's own, or torch's if images are mixed. It is not overwritten while it is referenced. Clone it before changing
    it in place.
    """

    inputs: Mapping[str, Tensor]
    """What the networks are called with, by name: `{"images": [N, 3, H, W]}`, float32 or float16, normalized by the
    transform; of a loader of your own, whatever it gives, each `[N, ...]`."""
    labels: Tensor | None
    """`[N]` int64 class indices, `[N, K]` float32 weights after mixing, or None for unlabeled data."""
    index: Tensor
    """`[N]` int64, index of the sample in the dataset."""
    valid: Tensor
    """`[N]` bool; False for a row to ignore: padding, or the substitute for an unreadable image."""
    masks: Tensor | None
    """`[N, H, W]` int64, the class of each pixel of `images`, or the ignore index; None for data without masks."""
    views: Mapping[str, Tensor]
    """More views of the same samples by name, `[N, 3, H, W]`, or `[N, count, 3, H, W]` of one with a `count`."""
    teacher: Mapping[str, Tensor]
    """The teacher's outputs by name, float32: those of `Teacher.outputs`, such as `"logits"` `[N, K]`; empty without a
    teacher. Those of a view with a `count` are `[N, count, ...]`."""
    teacher_views: Mapping[str, str]
    """The view that an output of the teacher is of, by the name of the output, if it is not `images`."""
    extra: Mapping[str, Any]
    """What else a loader of your own gives with each batch, by name; no network is called with it."""

    def __init__(self, fields: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Make a batch of its fields by name, as `dict(batch)` and `asdict()` have them.

        Args:
            fields: the fields as a mapping.
            more: the fields as keywords: `labels`, `index`, `valid`, `masks`, `views`, `teacher`, `teacher_views`,
                `extra` and `inputs`, of which only `index` and `valid` must be there. All others are inputs by name,
                such as `images`.

        Raises:
            TypeError: a field is missing, or there is no input.
        """
        given = {**(fields or {}), **more}
        own = {name: given.pop(name, None) for name in ("inputs", *_OWN_FIELDS)}
        inputs = {**(own["inputs"] or {}), **given}
        if own["index"] is None or own["valid"] is None or not inputs:
            raise TypeError("a KDBatch needs index, valid and at least one input, such as images")
        own |= {"inputs": inputs, **{name: own[name] or {} for name in _MAPPINGS}}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    @property
    def images(self) -> Tensor:
        """`[N, 3, H, W]`: the input called `images`."""
        if "images" not in self.inputs:
            raise AttributeError(
                f"this batch has no images, but {', '.join(self.inputs)}: take batch.inputs, or batch[{self._first!r}]"
            )
        return self.inputs["images"]

    def view(self, name: str) -> Tensor:
        """The view called `name`, which may be `images`.

        Raises:
            KeyError: there is none.
        """
        if name == IMAGES:
            return self.images
        if name in self.views:
            return self.views[name]
        raise KeyError(f"the batch has no view {name!r}; it has {', '.join([IMAGES, *self.views])}")

    def of_view(self, name: str) -> Self:
        """The batch for a student that sees the view `name`, which is its `images`; they are not copied.

        Of a view with a `count`, each copy is a row, `[N * count, 3, H, W]` in the order of the samples, and has what
        its sample has of labels, index, valid, masks and the teacher's outputs. Outputs `[N, count, ...]` of as many
        copies are those of the rows; of another number of copies they are left out, and so are the other views.

        Raises:
            KeyError: there is no such view.
        """
        if name == IMAGES and not self.teacher_views:
            return self
        images = self.view(name)
        copies = images.shape[1] if images.ndim == 5 else None
        teacher = {}
        for output, tensor in self.teacher.items():
            of_output = self.views.get(self.teacher_views.get(output, IMAGES))
            own_copies = of_output.shape[1] if of_output is not None and of_output.ndim == 5 else None
            if own_copies == copies:
                teacher[output] = tensor.flatten(0, 1) if copies else tensor
            elif own_copies is None:
                teacher[output] = tensor.repeat_interleave(copies or 1, 0)
        if copies is None:
            return self.replace(images=images, teacher=teacher)
        rows = (self.labels, self.index, self.valid, self.masks)
        labels, index, valid, masks = (None if each is None else each.repeat_interleave(copies, 0) for each in rows)
        return type(self)(
            images=copies_as_rows(images), labels=labels, index=index, valid=valid, masks=masks, teacher=teacher
        )

    @property
    def input(self) -> Tensor | Mapping[str, Tensor]:
        """What a network or teacher is called with: the only input, or all of several by name."""
        return self.inputs[self._first] if len(self.inputs) == 1 else self.inputs

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The batch on `device`; returns `self` if it is there already, as Lightning and accelerate expect."""
        target = torch.device(device)
        if all(each.device == target for each in self.tensors()):
            return self
        return type(self)(map_tensors(lambda each: each.to(device, non_blocking=non_blocking), self.asdict()))

    def tensors(self) -> Iterator[Tensor]:
        """All tensors, those in mappings too."""
        return _tensors(self.asdict())

    def clone(self) -> Self:
        """The batch in memory of its own."""
        return type(self)(map_tensors(Tensor.clone, self.asdict()))

    def replace(self, **changes: Any) -> Self:
        """A batch with other values in some fields, which are named as for a new one; nothing is copied."""
        inputs = changes.pop("inputs", self.inputs)
        own = {name: changes.pop(name, getattr(self, name)) for name in _OWN_FIELDS}
        return type(self)(inputs={**inputs, **changes}, **own)

    def asdict(self) -> dict[str, Any]:
        """A plain dict that a new batch can be made of: the inputs by name, and the fields that are there."""
        found: dict[str, Any] = {**self.inputs}
        if self.labels is not None:
            found["labels"] = self.labels
        found |= {"index": self.index, "valid": self.valid}
        if self.masks is not None:
            found["masks"] = self.masks
        for name in _MAPPINGS:  # a comprehension would break the graph of torch.compile
            if getattr(self, name):
                found[name] = {**getattr(self, name)}
        return found

    def __getitem__(self, name: str) -> Any:
        fields = self.asdict()
        if name in fields:
            return fields[name]
        where = f"; that is batch.extra[{name!r}]" if name in self.extra else ""
        raise KeyError(f"a batch has no {name!r}{where}; it has {', '.join(fields)}")

    def __contains__(self, name: object) -> bool:
        return name in self.asdict()

    def __iter__(self) -> Iterator[str]:
        return iter(self.asdict())

    def __len__(self) -> int:
        return len(self.index)

    # Those of Mapping would count the rows.
    def keys(self) -> KeysView[str]:
        """The names of the fields."""
        return self.asdict().keys()

    def values(self) -> ValuesView[Any]:
        """The fields."""
        return self.asdict().values()

    def items(self) -> ItemsView[str, Any]:
        """The fields with their names."""
        return self.asdict().items()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={_shown(value)}' for name, value in self.items())})"

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a batch is not changed in place; make another one: batch.replace({name}=...)")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a batch keeps its fields; make another one: KDBatch({name}=..., ...)")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.asdict(),)

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def _first(self) -> str:
        return next(iter(self.inputs))


def copies_as_rows(images: Tensor) -> Tensor:
    """A view `[N, count, 3, H, W]` as `[N * count, 3, H, W]` in the same memory, and any other as it is."""
    return images.flatten(0, 1) if images.ndim == 5 else images


def rows_name(inputs: Mapping[str, Tensor]) -> str:
    """What people call the rows of the inputs of a network: `images`, or `samples` of anything else."""
    return "images" if "images" in inputs else "samples"


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in a field, or in a mapping of fields."""
    if isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, Tensor):
        yield value


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` of each tensor in it, also in mappings."""
    if isinstance(value, Mapping):
        return {name: map_tensors(function, each) for name, each in value.items()}
    return function(value) if isinstance(value, Tensor) else value


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_shown(each)}' for name, each in value.items())}}}"
    if not isinstance(value, Tensor):
        return value if isinstance(value, str) else type(value).__name__
    device = "" if value.device.type == "cpu" else f" {value.device}"
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}{device}"
